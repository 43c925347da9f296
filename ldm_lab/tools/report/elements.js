"use strict";

// What is shown comes in as text alone: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Attributes whose name begins with "on" are listeners; null, false and undefined leave one out. */
function element(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** An SVG element. */
function shape(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (![null, undefined, false].includes(value)) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number with four digits that count; what is not finite comes as a string and stays one. */
function digits(value) {
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function whole(images) {
  return Math.round(images).toLocaleString("en");
}

/** Where a number is to be found: the file below the run's folder, and the row of it. */
function source(number, run) {
  const file = number.file.startsWith(`${run.folder}/`) ? number.file.slice(run.folder.length + 1) : number.file;
  return number.images === null ? file : `${file}, images_seen ${number.images}`;
}

function interval(number) {
  return "low" in number ? `${digits(number.low)} to ${digits(number.high)}` : null;
}

/** A run's colour beside its name. */
function runName(run, place) {
  return element("span", { class: "run" }, element("i", { class: `swatch run${place % 8}` }), run.name);
}

/** A run's number in an element of its own, with its interval and where it is from. */
function numberIn(tag, number, run, chosen = false) {
  if (!number) return element(tag, { class: "none" }, "–");
  const range = interval(number);
  return element(
    tag,
    { class: chosen ? "number chosen" : "number", title: `${run.folder}: ${source(number, run)}` },
    digits(number.value),
    range && element("small", {}, range),
    number.images === null ? null : element("small", {}, `at ${whole(number.images)}`),
  );
}

/** A table that scrolls on its own where the page is narrow. Headings are text or nodes, rows are of cells. */
function table(headings, rows) {
  const head = element("thead", {}, element("tr", {}, headings.map((text) => element("th", { scope: "col" }, text))));
  return element("div", { class: "scroll", tabindex: "0" }, element("table", {}, head, element("tbody", {}, rows)));
}

function rowHeading(...children) {
  return element("th", { scope: "row" }, ...children);
}
