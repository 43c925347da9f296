// Pictures of all runs side by side, all moved by one slider over images seen.

/** The section; `onMove(images)` is told where the slider stands. */
function pictureSection(runs, groups, onMove) {
  const all = groups.flatMap((group) => group.runs.flat().map((shown) => shown.images));
  const steps = [...new Set(all)].sort((a, b) => a - b);
  const frames = [];
  const label = element("output", { for: "slider" });
  const slider = element("input", {
    id: "slider", type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1, oninput: move,
  });

  function move() {
    const images = steps[Number(slider.value)];
    label.value = `${whole(images)} images seen`;
    slider.setAttribute("aria-valuetext", label.value);
    for (const frame of frames) frame(images);
    onMove(images);
  }

  const row = (group) => {
    const figures = group.runs.map((shown, place) => pictureFrame(runs, group, shown, place, frames));
    const title = [`${group.name} `, element("small", {}, group.stage)];
    const note = group.note ? element("p", { class: "note" }, group.note) : null;
    const side = element("div", { class: "side" }, figures);
    if (group.main) return element("section", {}, element("h3", {}, title), note, side);
    return element("details", {}, element("summary", {}, title), note, side);
  };
  const rows = groups.map(row);
  const bar = element("div", { class: "slider" }, element("label", { for: "slider" }, "Training at"), slider, label);
  const section = element("section", { id: "pictures" }, element("h2", {}, "Pictures"), bar, rows);
  move();
  return section;
}

/** One run's picture of a kind: the newest that is no newer than the slider says. */
function pictureFrame(runs, group, shown, place, frames) {
  const image = element("img", { alt: "", onload: () => (image.style.maxWidth = `${2 * image.naturalWidth}px`) });
  const open = element("button", { class: "picture", type: "button", onclick: () => enlarge(image) }, image);
  const when = element("small");
  const figure = element("figure", {}, open, element("figcaption", {}, runName(runs[place], place), when));
  frames.push((images) => {
    const found = shown.filter((item) => item.images <= images).pop();
    figure.classList.toggle("absent", !found);
    open.hidden = !found;
    if (!found) {
      when.textContent = shown.length ? ` not before ${whole(shown[0].images)}` : " has none";
      return;
    }
    if (image.getAttribute("src") !== found.picture) image.src = found.picture;
    image.alt = `${group.name} of ${runs[place].name} at ${whole(found.images)} images`;
    open.title = "enlarge";
    when.textContent = ` at ${whole(found.images)}`;
  });
  return figure;
}

function enlarge(image) {
  const dialog = element("dialog", { onclick: () => dialog.close(), onclose: () => dialog.remove() });
  dialog.append(element("img", { src: image.src, alt: image.alt }), element("p", {}, image.alt));
  document.body.append(dialog);
  dialog.showModal();
}
