// One metric of all runs over images seen or device hours, as SVG.

const WIDTH = 420, HEIGHT = 236, LEFT = 56, RIGHT = 14, TOP = 10, BOTTOM = 36;

/** Choices that all charts follow. */
const view = { log: false, smooth: true, hours: false, cursor: null };

/**
 * A figure that redraws itself on `update()`.
 * metric: {metric, runs: [[images, value], ...] per run}, and `axis` where it is over something else than images;
 * hours: [[images, hours], ...] per run.
 */
function chart(runs, metric, hours) {
  const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: "0", role: "img" });
  const values = element("output", { class: "values" });
  const figure = element("figure", { class: "chart" }, element("figcaption", {}, metric.metric), drawing, values);
  let lines = [], scales = null, at = null;

  function update() {
    lines = metric.runs.map((points, place) => line(points, view.hours && !metric.axis ? hours[place] : null));
    scales = scaled(lines);
    drawing.replaceChildren();
    if (scales) drawing.append(...axes(scales, metric.axis), ...curves(lines, scales), marker(), cursor());
    drawing.setAttribute("aria-label", `${metric.metric}: ${described(at).join("; ") || "nothing to draw"}`);
    say();
  }

  function described(place) {
    return lines.flatMap((points, run) => {
      const point = place === null ? points[points.length - 1] : nearest(points, place);
      return point ? [`${runs[run].name} ${digits(point.value)} at ${whole(point.images)}`] : [];
    });
  }

  function say() {
    const rows = lines.map((points, run) => {
      const point = points.length ? (at === null ? points[points.length - 1] : nearest(points, at)) : null;
      if (!point) return null;
      return element(
        "span",
        { title: metric.axis ? null : `row images_seen ${point.images}` },
        element("i", { class: `swatch run${run % 8}` }),
        `${digits(point.value)} `,
        element("small", {}, `at ${whole(point.images)}`),
      );
    });
    const broken = metric.runs.flatMap((points, run) => {
      const first = points.find(([, value]) => typeof value !== "number");
      const text = first && `${runs[run].name}: ${first[1]} at ${whole(first[0])}`;
      return first ? [element("span", { class: "broken" }, text)] : [];
    });
    values.replaceChildren(...rows.filter(Boolean), ...broken);
  }

  function cursor() {
    if (at === null) return shape("g");
    const dots = lines.flatMap((points, run) => {
      const point = nearest(points, at);
      if (!point || !scales.drawable(point.y)) return [];
      return [shape("circle", { cx: scales.x(point.x), cy: scales.y(point.y), r: 3.5, class: `dot run${run % 8}` })];
    });
    return shape("g", { class: "cursor" }, upright(at, "hair"), ...dots);
  }

  /** Where the pictures stand. */
  function marker() {
    const outside = view.cursor === null || view.cursor > scales.last || view.cursor < scales.first;
    return outside || view.hours || metric.axis ? shape("g") : upright(view.cursor, "marker");
  }

  function upright(x, kind) {
    return shape("line", { x1: scales.x(x), x2: scales.x(x), y1: TOP, y2: HEIGHT - BOTTOM, class: kind });
  }

  function move(x) {
    at = x;
    const group = drawing.querySelector(".cursor") || drawing.lastChild;
    if (scales && group) group.replaceWith(cursor());
    say();
  }

  drawing.addEventListener("pointermove", (event) => {
    if (!scales) return;
    const box = drawing.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    move(scales.first + Math.min(1, Math.max(0, share)) * (scales.last - scales.first));
  });
  drawing.addEventListener("pointerleave", () => move(null));
  drawing.addEventListener("blur", () => move(null));
  drawing.addEventListener("keydown", (event) => {
    if (!scales || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const step = ((scales.last - scales.first) / 50) * (event.key === "ArrowLeft" ? -1 : 1);
    move(Math.min(scales.last, Math.max(scales.first, (at === null ? scales.last : at) + step)));
    event.preventDefault();
  });
  update();
  return { figure, update, isEmpty: () => !metric.runs.some((points) => points.length) };
}

/** Points with `x`, `value`, and `y` that is drawn: the running mean where smoothing is on. */
function line(points, hours) {
  const finite = points.filter(([, value]) => typeof value === "number");
  const weight = view.smooth && isNoisy(finite.map(([, value]) => value)) ? Math.exp(-40 / finite.length) : 0;
  let mean = 0, total = 0;
  return finite.flatMap(([images, value]) => {
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    const x = hours === null ? images : between(hours, images);
    return x === null ? [] : [{ images, value, x, y: mean / total, smooth: weight > 0 }];
  });
}

/** Whether values go up and down many times over. */
function isNoisy(values) {
  if (values.length <= 40) return false;
  const way = values.reduce((sum, value, place) => sum + (place ? Math.abs(value - values[place - 1]) : 0), 0);
  return way > 3 * (values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b)));
}

/** Device hours at a number of images, from those that were logged; null before them and after. */
function between(hours, images) {
  for (let place = 0; place < hours.length; place++) {
    const [seen, value] = hours[place];
    if (seen === images) return value;
    if (seen > images) {
      const [before, start] = place ? hours[place - 1] : [0, 0];
      return start + ((images - before) / (seen - before)) * (value - start);
    }
  }
  return null;
}

function nearest(points, x) {
  let found = null;
  for (const point of points) if (!found || Math.abs(point.x - x) < Math.abs(found.x - x)) found = point;
  return found;
}

/** From numbers to places in the drawing; null where there is nothing to draw. */
function scaled(lines) {
  const all = lines.flat();
  if (!all.length) return null;
  const log = view.log && all.some((point) => point.y > 0);
  const drawable = (value) => !log || value > 0;
  const shown = all.filter((point) => drawable(point.y)).map((point) => point.y);
  const form = log ? Math.log10 : (value) => value;
  let [low, high] = [Math.min(...shown.map(form)), Math.max(...shown.map(form))];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  [low, high] = [low - room, high + room];
  const first = Math.min(...all.map((point) => point.x)), last = Math.max(...all.map((point) => point.x));
  const span = last - first || 1;
  const floor = HEIGHT - BOTTOM;
  const inside = (y) => Math.min(floor, Math.max(TOP, y));
  return {
    log, first, last, low, high, drawable,
    x: (value) => LEFT + ((value - first) / span) * (WIDTH - LEFT - RIGHT),
    y: (value) => inside(floor - ((form(value) - low) / (high - low)) * (floor - TOP)),
  };
}

/** Round numbers within [low, high]. */
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const factor of high - low > 1.5 ? [1] : [1, 2, 5]) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
  return inside.length > 1 ? inside : ticks(10 ** low, 10 ** high, 3).filter((value) => value > 0);
}

function axes(scales, axis) {
  const parts = [];
  for (const value of scales.log ? logTicks(scales.low, scales.high) : ticks(scales.low, scales.high, 4)) {
    const y = scales.y(value);
    parts.push(shape("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, class: "grid" }));
    parts.push(shape("text", { x: LEFT - 6, y: y + 3.5, class: "tick end" }, digits(value)));
  }
  for (const value of ticks(scales.first, scales.last, 4)) {
    const label = view.hours && !axis ? digits(value) : short(value);
    parts.push(shape("text", { x: scales.x(value), y: HEIGHT - BOTTOM + 15, class: "tick middle" }, label));
  }
  const title = axis || (view.hours ? "device hours" : "images seen");
  parts.push(shape("text", { x: WIDTH - RIGHT, y: HEIGHT - 3, class: "tick end faint" }, title));
  return parts;
}

function short(images) {
  if (images >= 1e6) return `${Number((images / 1e6).toPrecision(3))} M`;
  return images >= 1e4 ? `${Number((images / 1e3).toPrecision(3))} k` : whole(images);
}

function curves(lines, scales) {
  return lines.flatMap((points, run) => {
    const color = `run${run % 8}`;
    const drawable = points.filter((point) => scales.drawable(point.y));
    const path = (key) => {
      const kept = drawable.filter((point) => scales.drawable(point[key]));
      return kept.map((p, i) => `${i ? "L" : "M"}${scales.x(p.x).toFixed(1)} ${scales.y(p[key]).toFixed(1)}`).join("");
    };
    const smooth = drawable.some((point) => point.smooth);
    const raw = smooth ? [shape("path", { d: path("value"), class: `raw ${color}` })] : [];
    const dot = (p) => shape("circle", { cx: scales.x(p.x), cy: scales.y(p.y), r: 2.2, class: `dot ${color}` });
    const dots = drawable.length <= 40 ? drawable.map(dot) : [];
    return [...raw, shape("path", { d: path("y"), class: `curve ${color}` }), ...dots];
  });
}
