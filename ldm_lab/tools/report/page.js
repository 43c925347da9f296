// The page, from the content beside it.

function build(content) {
  const { runs } = content;
  const charts = [];
  const redraw = () => charts.forEach((one) => one.update());
  const moved = (images) => {
    view.cursor = images;
    redraw();
  };
  const main = element(
    "main",
    {},
    header(content),
    summary(content),
    content.pictures.length ? pictureSection(runs, content.pictures, moved) : null,
    curveSection(content, charts, redraw),
    metricSection(content),
    speedSection(content),
    settingSection(content),
    element(
      "footer",
      {},
      "A number's file and row are shown where the pointer rests on it; rows of metrics.csv are found by images_seen. ",
      `Made by ldm_lab ${content.version}.`,
    ),
  );
  document.body.append(main);
}

function header({ runs, warnings }) {
  const states = (run) => run.stages.map((one) => {
    const length = one.planned && !one.finished ? `${whole(one.images)} of ${whole(one.planned)}` : whole(one.images);
    const state = one.finished ? "finished" : "not finished";
    return element("span", { class: "state" }, `${one.stage}: ${length} images, ${state}`);
  });
  const item = (run, place) => element("li", {}, runName(run, place), element("code", {}, run.folder), states(run));
  return element(
    "header",
    {},
    element("h1", {}, runs.length > 1 ? "Runs compared" : "A run"),
    element("ul", { class: "runs" }, runs.map(item)),
    warnings.map((line) => element("p", { class: "warning", role: "alert" }, line)),
  );
}

function summary({ runs, verdict, comparisons }) {
  const isAlone = (found) => runs.length > 1 && found.values.filter(Boolean).length < 2;
  const alone = comparisons.filter(isAlone).map((found) => `${found.stage || ""} ${found.metric} ${found.says}`.trim());
  return element(
    "section",
    { id: "summary" },
    element("p", { class: "verdict" }, verdict),
    element("div", { class: "cards" }, comparisons.filter((one) => !isAlone(one)).map((one) => card(runs, one))),
    alone.length ? element("p", { class: "note" }, `Not compared: ${alone.join("; ")}.`) : null,
  );
}

function card(runs, found) {
  const state = found.best !== null ? "decided" : found.compares || runs.length < 2 ? "even" : "refused";
  const row = (number, place) => {
    const value = numberIn("span", number, runs[place], place === found.best);
    return element("li", {}, runName(runs[place], place), value);
  };
  const rule = [found.stage, `${found.better} is better`].filter(Boolean).join(", ");
  return element(
    "article",
    { class: `card ${state}` },
    element("h3", {}, found.metric, " ", element("small", {}, rule)),
    element("ul", {}, found.values.map(row)),
    runs.length > 1 ? element("p", {}, found.says) : null,
    element("p", { class: "source" }, sources(found.values, runs).map((text) => element("span", {}, text))),
  );
}

/** Where some numbers are from, each place once. */
function sources(numbers, runs) {
  return [...new Set(numbers.flatMap((number, place) => (number ? [source(number, runs[place])] : [])))];
}

function curveSection({ runs, curves: stages }, charts, redraw) {
  const known = stages.some((stage) => stage.hours.some((points) => points.length));
  const set = (key) => (event) => {
    view[key] = event.target.checked;
    redraw();
  };
  const box = (text, key, more = {}) => {
    const input = element("input", { type: "checkbox", checked: view[key], onchange: set(key), ...more });
    return element("label", { title: more.title }, input, ` ${text}`);
  };
  const controls = element(
    "div",
    { class: "controls" },
    box("logarithmic", "log"),
    box("smooth noisy curves", "smooth"),
    box("over device hours", "hours", known ? {} : { disabled: true, title: "no run has logged perf/device_hours" }),
    runs.map(runName),
  );
  const parts = stages.flatMap((stage) => {
    const made = stage.metrics.map((metric) => chart(runs, metric, stage.hours));
    charts.push(...made);
    return [element("h3", {}, stage.stage), element("div", { class: "charts" }, made.map((one) => one.figure))];
  });
  return element("section", { id: "curves" }, element("h2", {}, "Curves"), controls, parts);
}

function metricSection({ runs, metrics }) {
  const rows = (kept) => kept.map((one) => {
    const best = winner(one.final, one.better);
    const cells = one.final.map((number, place) => metricCell(number, one.best[place], runs[place], place === best));
    return element("tr", {}, rowHeading(one.metric, element("small", {}, one.stage)), cells);
  });
  const shown = (kept) => table(["last value", ...runs.map(runName)], rows(kept));
  const main = metrics.filter((one) => one.main), rest = metrics.filter((one) => !one.main);
  return element(
    "section",
    { id: "metrics" },
    element("h2", {}, "Metrics"),
    main.length ? shown(main) : null,
    rest.length ? element("details", {}, element("summary", {}, `${rest.length} more`), shown(rest)) : null,
  );
}

/** The last value, and the best one where it was another. */
function metricCell(number, best, run, chosen) {
  const cell = numberIn("td", number, run, chosen);
  if (best && best.value !== number.value) {
    const text = `best ${digits(best.value)} at ${whole(best.images)}`;
    cell.append(element("small", { title: `${run.folder}: ${source(best, run)}` }, text));
  }
  return cell;
}

/** Place of the best number; null where none is better than all others, or their intervals meet. */
function winner(numbers, better) {
  const known = numbers.filter((one) => one && typeof one.value === "number");
  if (!better || known.length < 2) return null;
  const sign = better === "lower" ? 1 : -1;
  const [best, second] = known.sort((one, other) => sign * (one.value - other.value));
  const meet = "low" in best && "low" in second && best.low <= second.high && second.low <= best.high;
  return meet || best.value === second.value ? null : numbers.indexOf(best);
}

function speedSection({ runs, speed }) {
  const rows = speed.map((one) => {
    const cells = one.final.map((number, place) => numberIn("td", number, runs[place]));
    return element("tr", {}, rowHeading(one.metric, element("small", {}, one.stage)), cells);
  });
  return element("section", { id: "speed" }, element("h2", {}, "Speed"), table(["", ...runs.map(runName)], rows));
}

function settingSection({ runs, settings }) {
  if (runs.length < 2) return null;
  const shown = (kept) => table(
    ["setting", ...runs.map(runName)],
    kept.map((one) => element(
      "tr",
      {},
      rowHeading(element("code", {}, one.key), element("small", {}, one.stage)),
      one.values.map((value) => element("td", { class: value === null ? "none" : "setting" }, value ?? "–")),
    )),
  );
  const matter = settings.filter((one) => !one.harmless), rest = settings.filter((one) => one.harmless);
  const folded = element("summary", {}, `${rest.length} more: places, devices, what is logged`);
  return element(
    "section",
    { id: "settings" },
    element("h2", {}, "Settings that differ"),
    matter.length ? shown(matter) : element("p", {}, "None that changes data, model or objective."),
    rest.length ? element("details", {}, folded, shown(rest)) : null,
  );
}

build(JSON.parse(document.getElementById("content").textContent));
