"use strict";
/* The report's page. Order of this file:

     state      what is selected; select() changes it and draws what depends on it
     words      figures for people
     elements   DOM helpers; text from the report goes in as text nodes only, never as markup
     tables     a table that sorts and filters
     map        the model as cells, the tooltip, the selected layer's detail
     figures    Plotly: one function a figure gives its traces, its layout and a note
     start      everything drawn once

   `data` is what html.py's page_data() made. Plotly reads markup in texts, so each text that it gets goes through plain(). */

// State

const data = JSON.parse(document.getElementById("data").textContent);
const candidates = data.candidates.map((candidate) => ({
  ...candidate, layers: unpack(candidate.layers), modules: unpack(candidate.modules),
}));
const state = { candidate: Math.max(0, candidates.findIndex((c) => !c.identical)), layer: 0, colour: "alone" };
const selected = () => candidates[state.candidate];

function unpack({ keys, rows }) {
  return rows.map((row) => Object.fromEntries(keys.map((key, i) => [key, row[i]])));
}

function select(change) {
  Object.assign(state, change);
  drawMap();
  drawDetail();
  if ("candidate" in change) drawCandidate();
}

function drawCandidate() {
  layerTable.fill(selected().layers);
  moduleTable.fill(selected().modules);
  drawFigure("worst");
}

/** The map's cell that a module belongs to. */
function cellOf(module) {
  if (module.role.startsWith("mtp.")) return null;
  if (module.layer !== null) return String(module.layer);
  return module.role === "embedding" ? "embedding" : "head";
}

// Words

const KINDS = { embedding: { title: "embedding" }, ...data.kinds, head: { title: "final norm and head" } };
const FORMATS = data.formats;
const MEASURES = { alone: "own error", stream: "accumulated error" };
const formatName = (format) => FORMATS[format] ?? format;
const kindName = (layer) => KINDS[layer.kind].title;
const letterOf = (layer) => KINDS[layer.kind].letter;
const layerName = (layer) => (letterOf(layer) ? `Layer ${layer.name}, ${kindName(layer)}` : kindName(layer));

function figure(x, digits = 3) {
  if (x === 0) return "0";
  return Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6 ? x.toExponential(digits - 1) : x.toPrecision(digits);
}

const perplexityText = (x) => (x < 1e5 ? x.toFixed(2) : x.toExponential(3));

/** Of a share or a relative error; never a rounded 0% or 100%. */
function percent(x) {
  const value = 100 * x;
  if (value > 0 && value < 0.001) return "<0.001%";
  if (value > 99 && value < 100) return value < 99.995 ? `${value.toFixed(2)}%` : ">99.99%";
  if (value >= 100 || value === 0) return `${value.toFixed(0)}%`;
  return `${value >= 10 ? value.toFixed(1) : value.toPrecision(3)}%`;
}

function change(x) {
  const text = (100 * x).toFixed(2);
  return `${text.startsWith("-") ? "" : "+"}${text === "-0.00" ? "+0.00" : text}%`;
}

const decibels = (relative) => (relative > 0 ? -20 * Math.log10(relative) : null);
const db = (x) => x.toFixed(1);
const count = (x) => x.toLocaleString("en-US");

function size(bytes) {
  const unit = [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find(([, scale]) => bytes >= scale);
  return unit ? `${(bytes / unit[1]).toFixed(2)} ${unit[0]}` : `${bytes} B`;
}

function errorText(relative) {
  return relative > 0 ? `${percent(relative)} (${db(decibels(relative))} dB)` : "none";
}

function shortened(text, limit = 28) {
  return text.length <= limit ? text : `${text.slice(0, limit - 1)}\u2026`;
}

const sum = (values) => values.reduce((total, x) => total + x, 0);

/** [format, its share of the weights], the largest first. */
function shares(formats) {
  const total = sum(Object.values(formats));
  const used = Object.entries(formats).filter(([, n]) => n > 0);
  return used.sort((a, b) => b[1] - a[1]).map(([format, n]) => [format, n / total]);
}

function sharesText(formats) {
  return shares(formats).map(([format, share]) => `${formatName(format)} ${percent(share)}`).join(", ");
}

// Elements

const byId = (id) => document.getElementById(id);

/** An element with properties and children; a string child becomes a text node. */
function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function radios(host, name, options, current, pick) {
  host.replaceChildren(...options.map(({ value, label, title = "" }) => {
    const input = el("input", { type: "radio", name, checked: value === current });
    input.addEventListener("change", () => pick(value));
    return el("label", { title }, input, ...label);
  }));
}

const dot = (i) => el("span", { className: `dot series-${i % data.series}` });
const formatColour = (format) => (format in FORMATS ? format : "changed"); // a variable of the style sheet
const tag = (format) => el("span", { className: `tag format-${formatColour(format)}` }, formatName(format));
const pairs = (entries) => entries.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]);

// Tables

const words = (head, value, show = (x) => x, title = "") => ({ head, value, show, title, numeric: false });
const numbers = (head, value, show, title = "") => ({ head, value, show, title, numeric: true });

/** Rows in their first order until a head is selected; then sorted, nulls always last. Numbers begin with the largest. */
class Table {
  static LIMIT = 200;

  constructor(host, columns, empty = "Nothing here differs from the source.") {
    Object.assign(this, { columns, empty, rows: [], query: "", by: null, up: false });
    this.heads = columns.map((column) => {
      const button = el("button", { type: "button", title: column.title }, column.head);
      button.addEventListener("click", () => this.sort(column));
      return el("th", { scope: "col", className: column.numeric ? "number" : "" }, button);
    });
    this.body = el("tbody");
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...this.heads)), this.body);
    this.box = el("div", { className: "table", tabIndex: 0 }, table); // in the tab order, so that the keyboard can scroll it
    this.more = el("p", { className: "more", role: "status" });
    host.replaceChildren(this.box, this.more);
  }

  fill(rows) {
    this.rows = rows;
    this.draw();
  }

  filter(query) {
    this.query = query.trim().toLowerCase();
    this.draw();
  }

  sort(column) {
    this.up = this.by === column ? !this.up : !column.numeric;
    this.by = column;
    this.draw();
  }

  found() {
    const texts = this.columns.filter((column) => !column.numeric);
    return this.rows.filter((row) => texts.some((column) => String(column.value(row) ?? "").toLowerCase().includes(this.query)));
  }

  compare(a, b) {
    const [x, y] = [this.by.value(a), this.by.value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = this.by.numeric ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return this.up ? order : -order;
  }

  draw() {
    const rows = this.found();
    if (this.by) rows.sort((a, b) => this.compare(a, b));
    this.columns.forEach((column, i) => {
      this.heads[i].ariaSort = column !== this.by ? "none" : this.up ? "ascending" : "descending";
    });
    this.body.replaceChildren(...rows.slice(0, Table.LIMIT).map((row) => this.line(row)));
    this.box.hidden = !rows.length;
    this.more.textContent = this.remark(rows.length);
  }

  line(row) {
    return el("tr", {}, ...this.columns.map((column) => this.cell(column, row)));
  }

  cell(column, row) {
    const value = column.value(row);
    const className = column.numeric ? "number" : "long";
    const title = typeof value === "string" && value.length > 40 ? value : "";
    return el("td", { className, title }, value === null ? "\u2013" : column.show(value, row));
  }

  remark(found) {
    if (!found) return this.query ? "Nothing matches the filter." : this.empty;
    const hidden = found - Table.LIMIT;
    if (hidden > 0) return `The first ${Table.LIMIT} rows; ${count(hidden)} more are not shown. Sort or filter to see others.`;
    return this.query ? `${count(found)} of ${count(this.rows.length)} rows match.` : "";
  }
}

const mtpChange = (c) => (c.mtp === null || data.mtp === null ? null : c.mtp - data.mtp);
const mtpColumns = [
  numbers("MTP acceptance", (c) => c.mtp, percent),
  numbers("Change, points", mtpChange, (x) => change(x).slice(0, -1), "Of MTP acceptance, in percentage points"),
];
const comparison = new Table(byId("comparison"), [
  words("Checkpoint", (c) => c.name, (name, c) => el("span", {}, dot(candidates.indexOf(c)), name)),
  numbers("KL mean", (c) => c.kl, (x) => figure(x), "Nats, over all predicted positions"),
  numbers("Median", (c) => c.kl_median, (x) => figure(x), "Of KL, in nats"),
  numbers("99%", (c) => c.kl_p99, (x) => figure(x), "Of KL, in nats: one position in a hundred is above"),
  numbers("Perplexity", (c) => c.perplexity, perplexityText),
  numbers("Change", (c) => (c.ratio === null ? null : c.ratio - 1), change, "Of perplexity"),
  numbers("Top-1", (c) => c.top1, percent, "Same likeliest next token"),
  numbers("Top-5", (c) => c.top5, percent, "Of the five likeliest next tokens"),
  ...(candidates.some((c) => c.mtp !== null) ? mtpColumns : []),
  numbers("Bits a weight", (c) => c.bits, (x) => x.toFixed(2)),
  numbers("Size", (c) => c.bytes, size),
  numbers("Smaller by", (c) => c.compression, (x) => `${x.toFixed(2)}x`),
]);

const layerTable = new Table(byId("layers"), [
  words("Layer", (y) => selected().layers.indexOf(y), (_, y) => y.name),
  words("Kind", kindName),
  words("Weights", (y) => sharesText(y.formats)),
  numbers("Own error", (y) => y.alone, percent),
  numbers("SQNR dB", (y) => decibels(y.alone), db, "Of the layer's own error"),
  numbers("Accumulated", (y) => y.stream, percent),
  numbers("SQNR dB", (y) => decibels(y.stream), db, "Of the stream after the layer"),
  numbers("Routing flips", (y) => y.flipped, percent),
  numbers("Tokens with a flip", (y) => y.flipped_tokens, percent),
  numbers("SSM state error", (y) => y.state, percent, "Of the scan's state after the last position"),
]);

const expertText = (_, m) => `no. ${m.expert}: ${db(m.expert_db)} dB, median ${db(m.expert_median_db)}`;
const moduleColumns = [
  words("Module", (m) => m.name),
  words("Role", (m) => m.role),
  words("Weight", (m) => (m.role === "kv_cache" ? null : m.format), tag, "A KV cache has no weights"),
  words("Input", (m) => m.input_format, tag),
  numbers("Effect", (m) => m.effect, percent, "Relative error of the stream when only this module is the checkpoint's"),
  numbers("Solved: error of plain", (m) => m.of_plain, percent, "Error in outputs on calibration's inputs, of that of plain rounding"),
  numbers("Weight SQNR dB", (m) => m.weight_db, db),
  numbers("Weight saturated", (m) => m.weight_saturated, percent, "Weights beyond their scale"),
  numbers("Weight flushed", (m) => m.weight_flushed, percent, "Weights that became zero"),
  numbers("Input SQNR dB", (m) => m.input_db, db),
  numbers("Input saturated", (m) => m.input_saturated, percent, "Inputs beyond their scale"),
  numbers("Input flushed", (m) => m.input_flushed, percent, "Inputs that became zero"),
  numbers("Size", (m) => m.bytes, size),
  numbers("Worst expert", (m) => m.expert_db, expertText, "By weight SQNR"),
];
const moduleTable = new Table(byId("modules"), moduleColumns);
const detailTable = new Table(
  byId("detail-modules"), moduleColumns.filter(({ head }) => head !== "Role"), "No module of this layer differs from the source.",
);

// Map

const tooltip = byId("tooltip");

/** The map's own bounds over all candidates, so that colours mean the same for each. */
function heatBounds(measure) {
  const values = candidates.flatMap((c) => c.layers.map((y) => y[measure])).filter((x) => x > 0);
  return values.length ? [Math.min(...values), Math.max(...values)] : null;
}

function cell(layer, i) {
  const letter = letterOf(layer);
  const label = letter ? [el("b", {}, letter), el("small", {}, layer.name)] : [el("small", {}, kindName(layer))];
  const button = el("button", { type: "button", className: letter ? "cell" : "cell wide" }, ...label, el("i"));
  button.dataset.layer = i;
  return button;
}

function colourCell(button, layer) {
  const parts = shares(layer.formats);
  let end = 0;
  const stops = parts.map(([format, share]) => `var(--${formatColour(format)}) ${100 * end}% ${100 * (end += share)}%`);
  button.style.setProperty("--shares", `linear-gradient(to right, ${stops.join(", ")})`);
  button.classList.remove("format", "heat", "hot");
  if (state.colour === "format") colourByFormat(button, parts);
  else colourByError(button, layer[state.colour], heatBounds(state.colour));
}

/** One colour, or stripes of the two formats with most weights; unquantized rest (norms, routers) does not count. */
function colourByFormat(button, parts) {
  const formats = parts.map(([format]) => format).filter((format) => format !== "source");
  const [a, b = a] = formats.length ? formats : ["source"];
  button.classList.add("format");
  button.style.setProperty("--a", `var(--${formatColour(a)})`);
  button.style.setProperty("--b", `var(--${formatColour(b)})`);
}

function colourByError(button, error, bounds) {
  if (!(error > 0)) return;
  const [low, high] = bounds.map(Math.log);
  const heat = high > low ? (Math.log(error) - low) / (high - low) : 1;
  button.classList.add("heat");
  button.classList.toggle("hot", heat > 0.62);
  button.style.setProperty("--heat", `${(100 * heat).toFixed(1)}%`);
}

/** One cell is in the tab order, the arrow keys reach the others. */
function drawMap() {
  const { layers } = selected();
  layers.forEach((layer, i) => {
    const button = byId("map").children[i];
    button.ariaPressed = String(i === state.layer);
    button.tabIndex = i === state.layer ? 0 : -1;
    button.ariaLabel = `${layerName(layer)}: own error ${errorText(layer.alone)}, weights ${sharesText(layer.formats)}`;
    colourCell(button, layer);
  });
  byId("legend").replaceChildren(...(state.colour === "format" ? formatLegend(layers) : errorLegend()));
}

function formatLegend(layers) {
  const present = [...new Set(layers.flatMap((layer) => shares(layer.formats).map(([format]) => format)))];
  const chip = (name, text) => el("span", {}, el("i", { className: `chip ${name}` }), text);
  const chips = present.map((format) => chip(`format-${formatColour(format)}`, formatName(format)));
  return [...chips, chip("mixed", "mixed: stripes of its quantized formats")];
}

function errorLegend() {
  const bounds = heatBounds(state.colour);
  if (!bounds) return [el("span", {}, "No layer has an error.")];
  const [low, high] = bounds.map(percent);
  return [el("span", {}, `${MEASURES[state.colour]} ${low}`, el("i", { className: "ramp" }), high), el("span", {}, "grey: none")];
}

function layerFigures(layer) {
  const entries = [
    ["Own error", errorText(layer.alone)], ["Accumulated", errorText(layer.stream)], ["Weights", sharesText(layer.formats) || "none"],
  ];
  const { flipped, flipped_tokens: tokens } = layer;
  if (flipped !== null) entries.push(["Routing flips", `${percent(flipped)} of choices, ${percent(tokens)} of tokens`]);
  if (layer.state !== null) entries.push(["SSM state", errorText(layer.state)]);
  if (layer.of_plain !== null) entries.push(["Solved", `${percent(layer.of_plain)} of plain rounding's error`]);
  return entries;
}

function showTooltip(button) {
  const layer = selected().layers[button.dataset.layer];
  const figures = el("dl", { className: "pairs" }, ...pairs(layerFigures(layer)));
  tooltip.replaceChildren(el("b", {}, layerName(layer)), el("div", { className: "hint" }, selected().name), figures);
  tooltip.hidden = false;
  placeTooltip(button);
}

/** Below the cell, or above it where the window ends. */
function placeTooltip(button) {
  const at = button.getBoundingClientRect();
  const left = Math.min(at.left, document.documentElement.clientWidth - tooltip.offsetWidth - 8);
  const below = at.bottom + 8 + tooltip.offsetHeight < innerHeight;
  tooltip.style.left = `${Math.max(8, left)}px`;
  tooltip.style.top = `${scrollY + (below ? at.bottom + 8 : at.top - tooltip.offsetHeight - 8)}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

function moveFocus(event) {
  const cells = [...byId("map").children];
  const row = Number(byId("map").style.getPropertyValue("--columns"));
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row, Home: -cells.length, End: cells.length };
  if (event.key === "Escape") hideTooltip();
  if (!(event.key in steps)) return;
  event.preventDefault();
  const at = cells.indexOf(document.activeElement) + steps[event.key];
  cells[Math.min(cells.length - 1, Math.max(0, at))].focus();
}

/** Rows of twenty layers, of ten where it is narrow, so that a row's first number is round. */
function setColumns() {
  const most = matchMedia("(max-width: 760px)").matches ? 10 : 20;
  byId("map").style.setProperty("--columns", Math.max(1, Math.min(most, selected().layers.length - 2)));
}

function startMap() {
  const map = byId("map");
  map.append(...selected().layers.map(cell));
  onCells("click", (button) => select({ layer: Number(button.dataset.layer) }));
  for (const name of ["mouseover", "focusin"]) onCells(name, showTooltip);
  for (const name of ["mouseleave", "focusout"]) map.addEventListener(name, hideTooltip);
  map.addEventListener("keydown", moveFocus);
  addEventListener("resize", setColumns);
  setColumns();
}

function onCells(name, use) {
  byId("map").addEventListener(name, (event) => {
    const button = event.target.closest(".cell");
    if (button) use(button);
  });
}

// Detail of the selected layer

function drawDetail() {
  const layer = selected().layers[state.layer];
  byId("detail-title").textContent = `${layerName(layer)}, in ${selected().name}`;
  byId("detail-figures").replaceChildren(...pairs([...layerFigures(layer), ...loadFigures()]));
  byId("figure-load").hidden = layer.flipped === null;
  if (layer.flipped !== null) drawFigure("load");
  detailTable.fill(selected().modules.filter((module) => cellOf(module) === layer.name));
}

/** Tokens per expert of the selected layer, the reference's busiest first. */
function loads() {
  const { load_change } = selected().layers[state.layer];
  const found = load_change.map((more, expert) => {
    const reference = data.loads[state.layer][expert];
    return { expert, reference, tokens: reference + more };
  });
  return found.sort((a, b) => b.reference - a.reference);
}

function loadFigures() {
  const found = loads();
  if (!found.length) return [];
  const total = sum(found.map((load) => load.tokens));
  const busiest = found.reduce((a, b) => (b.tokens > a.tokens ? b : a));
  const idle = (key) => found.filter((load) => load[key] === 0).length;
  return [
    ["Busiest expert", `no. ${busiest.expert}, ${percent(busiest.tokens / Math.max(1, total))} of choices`],
    ["Idle experts", `${idle("tokens")} of ${found.length}, ${idle("reference")} in the reference`],
  ];
}

// Figures

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross"];
const probe = document.body.appendChild(el("span", { hidden: true }));

/** A variable of the style sheet as Plotly wants it: light-dark() resolved. */
function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

const seriesColour = (i) => colour(`series-${i % data.series}`);

/** Text for Plotly, which reads markup and knows these three entities. */
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

const hover = (...lines) => lines.map(plain).join("<br>");

function axis(title, more = {}) {
  const line = colour("line");
  return { title: { text: title, font: { size: 12 } }, gridcolor: line, linecolor: line, zeroline: false, automargin: true, ...more };
}

const shareAxis = (title) => axis(title, { tickformat: "~%", rangemode: "tozero" });
const tickText = (x) => (x < 1e-3 ? x.toExponential(0) : String(Number(x.toPrecision(1))));

/** From a tick below the positive values to one above, at 1, 2 and 5 of each decade or, where there are many, at decades. */
function logAxis(title, values, unit = tickText) {
  const known = values.filter((x) => x > 0);
  if (!known.length) return axis(title);
  const [least, most] = [Math.min(...known), Math.max(...known)];
  const [low, high] = [Math.floor(Math.log10(least)), Math.ceil(Math.log10(most))];
  const decades = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  const ticks = decades.flatMap((decade) => (high - low > 3 ? [1] : [1, 2, 5]).map((step) => Number(`${step}e${decade}`)));
  const range = [(ticks.findLast((x) => x <= least) ?? least) * 0.9, (ticks.find((x) => x >= most) ?? most) * 1.1].map(Math.log10);
  return axis(title, { type: "log", tickvals: ticks, ticktext: ticks.map(unit), range });
}

const layerLabel = (layer) => (layer.kind === "embedding" ? "emb" : layer.name);

/** All layers, labelled at round numbers. */
function layerAxis() {
  const { layers } = candidates[0];
  const step = [1, 2, 5, 10, 20].find((s) => layers.length / s <= 14) ?? 50;
  const labelled = layers.filter((y) => (letterOf(y) ? y.name % step === 0 : step === 1)).map(layerLabel);
  const range = [-0.7, layers.length - 0.3];
  return axis("layer", { type: "category", categoryarray: layers.map(layerLabel), range, tickvals: labelled, tickangle: 0, showgrid: false });
}

function baseLayout(layout) {
  const [ink, soft, card, line] = ["ink", "soft", "card", "line"].map(colour);
  return {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", margin: { l: 48, r: 12, t: 12, b: 40 },
    font: { color: soft, size: 12, family: getComputedStyle(document.body).fontFamily },
    showlegend: candidates.length > 1, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink } },
    hovermode: "closest", hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink, size: 12 }, align: "left" },
    dragmode: false, // a finger that scrolls the page must not zoom a figure
    ...layout,
  };
}

/** A zero cannot stand on a log axis: a gap. */
const positive = (x) => (x > 0 ? x : null);

/** A candidate's line. */
function line(i, x, y, hovertext, { width = 2, shape = "linear", size = x.length > 40 ? 4 : 7, ...more } = {}) {
  const color = seriesColour(i);
  return {
    type: "scatter", mode: "lines+markers", name: plain(shortened(candidates[i].name)), x, y, hovertext, hoverinfo: "text",
    line: { color, width, shape }, marker: { color, size, symbol: SYMBOLS[i % 5] }, ...more,
  };
}

/** Traces of the candidates that have something to show, and a note that names the others. */
function ofCandidates(has, trace, layout, without) {
  const [shown, left] = [true, false].map((wanted) => candidates.flatMap((c, i) => (has(c) === wanted ? [i] : [])));
  return { traces: shown.map(trace), layout, note: left.length ? `${left.map((i) => candidates[i].name).join(", ")}: ${without}` : "" };
}

function byLayer(measure) {
  const trace = (i) => {
    const { name, layers } = candidates[i];
    const texts = layers.map((y) => hover(layerName(y), name, `${MEASURES[measure]} ${errorText(y[measure])}`));
    const values = layers.map((y) => positive(y[measure]));
    return line(i, layers.map(layerLabel), values, texts, { customdata: layers.map((_, j) => j), width: 1.5 });
  };
  const errors = candidates.flatMap((c) => c.layers.map((y) => y[measure]));
  const layout = { xaxis: layerAxis(), yaxis: logAxis("relative error", errors, (x) => `${tickText(100 * x)}%`) };
  const result = ofCandidates((c) => c.layers.some((y) => y[measure] > 0), trace, layout, "no error in any layer.");
  const gaps = result.traces.some((t) => t.y.includes(null));
  return { ...result, note: [result.note, gaps ? "A layer without an error is left out of the log axis." : ""].join(" ").trim() };
}

function flips() {
  const moe = candidates[0].layers.flatMap((y, j) => (y.flipped === null ? [] : [j]));
  if (!moe.length) return { traces: [], note: "This model has no mixture of experts." };
  const trace = (i) => {
    const layers = moe.map((j) => candidates[i].layers[j]);
    const text = (y) => [`${percent(y.flipped)} of choices flipped`, `${percent(y.flipped_tokens)} of tokens have a flip`];
    const texts = layers.map((y) => hover(layerName(y), candidates[i].name, ...text(y)));
    return line(i, layers.map(layerLabel), layers.map((y) => y.flipped), texts, { customdata: moe });
  };
  const layout = { xaxis: layerAxis(), yaxis: shareAxis("choices flipped") };
  return ofCandidates((c) => moe.some((j) => c.layers[j].flipped > 0), trace, layout, "no choice flipped.");
}

function histogram() {
  const trace = (i) => {
    const { name, histogram: { edges, counts } } = candidates[i];
    const parts = counts.map((n) => n / sum(counts));
    const texts = parts.map((share, bin) =>
      hover(name, `${percent(share)} of positions`, `KL ${figure(edges[bin], 2)} to ${figure(edges[bin + 1], 2)} nats`));
    const fillcolor = seriesColour(i).replace("rgb(", "rgba(").replace(")", ", 0.1)");
    return line(i, edges, [...parts, 0], texts, { mode: "lines", shape: "hv", fill: "tozeroy", fillcolor });
  };
  const moved = (c) => c.kl_max > 0;
  const reached = candidates.filter(moved).flatMap(({ histogram: { edges, counts } }) =>
    counts.flatMap((n, bin) => (n ? edges.slice(bin, bin + 2) : [])));
  const layout = { xaxis: logAxis("KL of a position, nats", reached), yaxis: shareAxis("positions") };
  return ofCandidates(moved, trace, layout, "KL is 0 at every position.");
}

function positions() {
  const trace = (i) => {
    const parts = candidates[i].positions;
    const texts = parts.map(([first, last, kl]) => hover(candidates[i].name, `position ${first} to ${last}`, `KL ${figure(kl)} nats`));
    const middles = parts.map(([first, last]) => (first + last) / 2);
    return line(i, middles, parts.map(([, , kl]) => positive(kl)), texts, { mode: "lines", width: 1.5 });
  };
  const values = candidates.flatMap((c) => c.positions.map(([, , kl]) => kl));
  const layout = { xaxis: axis("position in the row", { showgrid: false }), yaxis: logAxis("mean KL, nats", values) };
  return ofCandidates((c) => c.positions.some(([, , kl]) => kl > 0), trace, layout, "KL is 0 at every position.");
}

/** Where a point's label goes, so that labels of neighbours keep apart: left of the first, right of the last, below or above between. */
function labelPlace(i) {
  const near = candidates.map((c, at) => ({ ...c, at }))
    .filter((c) => c.kl > 0 && Math.abs(c.bits - candidates[i].bits) < 0.6 && Math.abs(Math.log(c.kl / candidates[i].kl)) < 0.5)
    .sort((a, b) => a.bits - b.bits || a.at - b.at);
  const rank = near.findIndex((c) => c.at === i);
  if (near.length === 1) return "top center";
  if (rank === 0) return "middle left";
  return rank === near.length - 1 ? "middle right" : ["bottom center", "top center"][rank % 2 ? 0 : 1];
}

function bits() {
  const trace = (i) => {
    const { name, bits: x, kl } = candidates[i];
    const text = hover(name, `${x.toFixed(2)} bits a weight`, `KL ${figure(kl)} nats`);
    const label = { text: [plain(shortened(name))], textposition: labelPlace(i), textfont: { color: colour("ink") }, cliponaxis: false };
    return line(i, [x], [kl], [text], { mode: "markers+text", size: 12, ...label });
  };
  const shown = candidates.filter((c) => c.kl > 0).map((c) => c.bits);
  const layout = {
    showlegend: false, xaxis: axis("bits a weight", { range: [Math.min(...shown) - 2, Math.max(...shown) + 2] }),
    yaxis: logAxis("mean KL, nats", candidates.flatMap((c) => [c.kl / 1.5, c.kl * 1.5])),
  };
  return ofCandidates((c) => c.kl > 0, trace, layout, "KL is 0, which a log axis cannot show.");
}

/** Bars, the largest on top, each with its name above it: names are long, and so need no room at the side. */
function worst() {
  const { worst: names, modules, name } = selected();
  const found = names.flatMap((worstName) => modules.find((m) => m.name === worstName) ?? []);
  if (!found.length) return { traces: [], note: `${name}: no module has an effect.` };
  const text = (m) => [`effect ${percent(m.effect)}`, `weight ${formatName(m.format)}, input ${formatName(m.input_format ?? "source")}`];
  const bars = {
    type: "bar", orientation: "h", x: found.map((m) => m.effect), y: found.map((_, i) => -i), width: 0.28,
    marker: { color: seriesColour(state.candidate) }, hovertext: found.map((m) => hover(m.name, m.role, ...text(m))), hoverinfo: "text",
  };
  const labels = {
    type: "scatter", mode: "text", x: found.map(() => 0), y: found.map((_, i) => 0.42 - i), text: found.map((m) => plain(m.name)),
    textposition: "middle right", textfont: { color: colour("ink"), size: 11 }, hoverinfo: "skip", cliponaxis: false,
  };
  const layout = {
    showlegend: false, margin: { l: 8, r: 12, t: 8, b: 36 }, xaxis: shareAxis("effect: relative error of the stream"),
    yaxis: { visible: false, range: [0.5 - found.length, 0.75] },
  };
  return { traces: [bars, labels], layout, note: `Of ${name}.` };
}

function load() {
  const found = loads();
  const ranks = found.map((_, i) => i + 1);
  const texts = found.map((l) => hover(`expert ${l.expert}`, `${count(l.tokens)} tokens`, `${count(l.reference)} in the reference`));
  const bars = {
    type: "bar", name: "reference", x: ranks, y: found.map((l) => l.reference), marker: { color: colour("source") }, opacity: 0.55,
    hovertext: texts, hoverinfo: "text",
  };
  const points = line(state.candidate, ranks, found.map((l) => l.tokens), texts, { mode: "markers" });
  const layout = {
    showlegend: true, bargap: 0.15, yaxis: axis("tokens", { rangemode: "tozero" }),
    xaxis: axis("experts, the reference's busiest first", { showgrid: false, range: [0, found.length + 1] }),
  };
  return { traces: [bars, points], layout, note: "" };
}

const FIGURES = { alone: () => byLayer("alone"), stream: () => byLayer("stream"), histogram, positions, flips, bits, worst, load };

/** Draws a figure, or its note in its place. A point that stands for a layer selects it. */
function drawFigure(id) {
  const [plot, note] = [".plot", ".note"].map((name) => byId(`figure-${id}`).querySelector(name));
  const drawn = FIGURES[id]();
  note.textContent = drawn.note;
  plot.hidden = !drawn.traces.length;
  if (plot.hidden) return Plotly.purge(plot);
  const first = !plot.classList.contains("js-plotly-plot");
  Plotly.react(plot, drawn.traces, baseLayout(drawn.layout), { displayModeBar: false, responsive: true });
  if (first) plot.on("plotly_click", ({ points: [{ customdata }] }) => Number.isInteger(customdata) && select({ layer: customdata }));
}

function drawFigures() {
  for (const id of Object.keys(FIGURES)) {
    const figure = byId(`figure-${id}`);
    if (figure && !figure.hidden) drawFigure(id);
  }
}

// Start

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

function drawTheme() {
  byId("theme").textContent = isDark() ? "Light theme" : "Dark theme";
  drawFigures();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawTheme();
}

/** Paper is white, whatever the screen was. */
function printLight() {
  let before;
  addEventListener("beforeprint", () => {
    before = isDark() ? "dark" : "light";
    setTheme("light");
  });
  addEventListener("afterprint", () => setTheme(before));
}

function start() {
  const choices = candidates.map((c, i) => ({ value: i, label: [dot(i), c.name], title: c.name }));
  radios(byId("pick"), "candidate", choices, state.candidate, (candidate) => select({ candidate }));
  const colours = Object.entries({ alone: "Own error", stream: "Accumulated error", format: "Format" });
  const toRadio = ([value, text]) => ({ value, label: [text] });
  radios(byId("colour"), "colour", colours.map(toRadio), state.colour, (value) => select({ colour: value }));
  byId("filter").addEventListener("input", (event) => moduleTable.filter(event.target.value));
  byId("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  dark.addEventListener("change", drawTheme);
  printLight();
  const own = selected().layers.map((layer) => layer.alone);
  comparison.fill(candidates);
  startMap();
  select({ layer: own.indexOf(Math.max(...own)) });
  drawCandidate();
  drawTheme();
}

start();
