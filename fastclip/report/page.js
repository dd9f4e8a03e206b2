"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const bins = data.first.length, tensors = data.names.length;
const heat = Uint8Array.from(atob(data.heat), (c) => c.charCodeAt(0));
const [ZERO, LOWEST, HIGHEST, INF, NAN] = data.codes;
const state = { from: 0, to: bins, bin: Math.max(bins - 1, 0), row: -1, order: [], drag: null };

// --- numbers in words
const shown = (x) => x === null ? "–" : typeof x === "string" ? x :
  x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(2).replace(/\.?0*e\+?/, "e") : String(Number(x.toPrecision(3)));
const whole = (x) => x.toLocaleString("en-US");
const steps = (b) => data.first[b] === data.last[b] ? `step ${whole(data.first[b])}`
  : `steps ${whole(data.first[b])} to ${whole(data.last[b])}`;
const normOf = (code) => 10 ** (data.low + (code - LOWEST) / (HIGHEST - LOWEST) * (data.high - data.low));
const meaning = (code) => code === NAN ? "NaN" : code === INF ? "Inf" : code === ZERO ? "0"
  : code < ZERO ? "no gradient" : `about ${shown(Number(normOf(code).toPrecision(2)))}`;

function tell(b) {
  const parts = [];
  const span = data.low_norm[b] === data.high_norm[b] ? "" : ` (${shown(data.low_norm[b])} to ${shown(data.high_norm[b])})`;
  parts.push(data.norm[b] === null ? "no finite norm" : `norm ${shown(data.norm[b])}${span}`);
  if (data.bound[b] !== null) parts.push(`bound ${shown(data.bound[b])}`);
  const of = data.records[b] > 1 ? ` of ${data.records[b]}` : "";
  for (const [name, counts] of [["clipped", data.clipped], ["skipped", data.skipped], ["rolled back", data.rolled_back],
    ["not finite", data.nonfinite]]) {
    if (counts[b]) parts.push(data.records[b] > 1 ? `${name} ${counts[b]}${of}` : name);
  }
  if (data.loss[b] !== null) parts.push(`loss ${shown(data.loss[b])}`);
  return `${steps(b)}: ${parts.join(", ")}`;
}

// --- colours
const STOPS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37]]; // viridis: even steps of lightness, told apart by every kind of colour vision
function ramp(t) {
  const at = Math.min(Math.max(t, 0), 1) * (STOPS.length - 1), i = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[i].map((v, c) => Math.round(v + (STOPS[i + 1][c] - v) * (at - i)));
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function palette() {
  const colours = new Array(256).fill([255, 31, 79]);
  for (let code = 0; code < ZERO; code++) colours[code] = rgb(css("--void"));
  colours[ZERO] = rgb(css("--still"));
  for (let code = LOWEST; code <= HIGHEST; code++) colours[code] = ramp((code - LOWEST) / (HIGHEST - LOWEST));
  return colours;
}

// --- canvases
function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const draw = canvas.getContext("2d");
  draw.setTransform(ratio, 0, 0, ratio, 0, 0);
  draw.clearRect(0, 0, width, height);
  draw.font = "12px " + css("--font");
  return { draw, width, height };
}
const gutter = () => window.innerWidth <= 640 ? 46 : 60;
const place = (b, left, width) => left + (b - state.from) / (state.to - state.from) * width;
function binAt(x, left, width) {
  const b = state.from + Math.floor((x - left) / width * (state.to - state.from));
  return Math.min(Math.max(b, state.from), state.to - 1);
}
function stepAxis(draw, left, width, y) {
  draw.fillStyle = css("--soft");
  draw.textBaseline = "top";
  const count = Math.max(2, Math.floor(width / 130));
  for (let i = 0; i <= count; i++) {
    const b = Math.min(state.to - 1, state.from + Math.round(i / count * (state.to - state.from)));
    draw.textAlign = i === 0 ? "left" : i === count ? "right" : "center";
    draw.fillText((i === 0 ? "step " : "") + whole(i === count ? data.last[b] : data.first[b]), left + i / count * width, y);
  }
}
function crosshair(draw, left, width, top, bottom) {
  if (state.bin < state.from || state.bin >= state.to) return;
  const x = place(state.bin + 0.5, left, width);
  draw.strokeStyle = css("--soft");
  draw.lineWidth = 1;
  draw.beginPath();
  draw.moveTo(x, top);
  draw.lineTo(x, bottom);
  draw.stroke();
}
function tick(draw, words, y, left, width) {
  draw.textAlign = "right";
  draw.textBaseline = "middle";
  draw.lineWidth = 1;
  draw.strokeStyle = css("--grid");
  draw.beginPath();
  draw.moveTo(left, y);
  draw.lineTo(left + width, y);
  draw.stroke();
  draw.fillStyle = css("--soft");
  draw.fillText(words, left - 6, y);
}
function logAxis(draw, low, high, y, left, width) {
  const first = Math.ceil(low), last = Math.floor(high), by = Math.max(1, Math.ceil((last - first) / 6));
  const ticks = [];
  for (let e = first; e <= last; e += by) ticks.push(e);
  if (ticks.length < 2) ticks.splice(0, ticks.length, low, (low + high) / 2, high);
  for (const e of ticks) tick(draw, shown(Number((10 ** e).toPrecision(2))), y(e), left, width);
}

// a line through the values that there are, a dot for one that stands alone; wide: each is as wide as its bin
function line(draw, left, width, y, colour, { dash = [], wide = false } = {}) {
  const half = wide ? (place(1, left, width) - place(0, left, width)) / 2 : 0;
  const lone = [];
  let before = null, from = 0;
  draw.strokeStyle = draw.fillStyle = colour;
  draw.lineWidth = 1.6;
  draw.setLineDash(dash);
  draw.beginPath();
  for (let b = state.from; b <= state.to; b++) {
    const v = b < state.to ? y(b) : null, x = place(b + 0.5, left, width);
    if (v === null && before !== null && b - from === 1 && !wide) lone.push([place(from + 0.5, left, width), before]);
    if (v !== null && before === null) { from = b; draw.moveTo(x - half, v); } else if (v !== null) draw.lineTo(x - half, v);
    if (v !== null && wide) draw.lineTo(x + half, v);
    before = v;
  }
  draw.stroke();
  draw.setLineDash([]);
  for (const [x, v] of lone) {
    draw.beginPath();
    draw.arc(x, v, 2.5, 0, 2 * Math.PI);
    draw.fill();
  }
}

function drawNorm() {
  const { draw, width, height } = prepare(byId("norm"), window.innerWidth <= 640 ? 230 : 300);
  if (!bins) return;
  const left = gutter(), inner = width - left - 8, top = 14, strip = height - 30, bottom = strip - 14;
  let low = Infinity, high = -Infinity, hasZero = false;
  for (let b = state.from; b < state.to; b++) {
    hasZero ||= data.low_norm[b] === 0;
    for (const v of [data.low_norm[b], data.high_norm[b], data.bound[b]]) {
      if (v > 0) { low = Math.min(low, Math.log10(v)); high = Math.max(high, Math.log10(v)); }
    }
  }
  if (low > high) { low = 0; high = 1; }
  const pad = Math.max(0.05 * (high - low), 0.08);
  low -= pad; high += pad;
  const ground = hasZero ? bottom - 16 : bottom; // 0 has no place on a logarithmic axis, but one below it
  const y = (e) => ground - (e - low) / (high - low) * (ground - top);
  const at = (v) => v > 0 ? y(Math.log10(v)) : bottom;
  logAxis(draw, low, high, y, left, inner);
  if (hasZero) tick(draw, "0", bottom, left, inner);
  stepAxis(draw, left, inner, height - 15);
  draw.fillStyle = css("--band");
  for (let b = state.from; b < state.to; b++) {
    if (data.high_norm[b] === null) continue;
    const x = place(b, left, inner), w = Math.max(place(b + 1, left, inner) - x, 1);
    draw.fillRect(x, at(data.high_norm[b]), w, Math.max(at(data.low_norm[b]) - at(data.high_norm[b]), 1));
  }
  const heightOf = (values) => (b) => values[b] === null ? null : at(values[b]);
  line(draw, left, inner, heightOf(data.norm), css("--accent"));
  line(draw, left, inner, heightOf(data.bound), css("--bound"), { dash: [6, 4], wide: true });
  // a mark is as wide as a pixel at least, so that none is lost
  for (let b = state.from; b < state.to; b++) {
    const x = place(b, left, inner), w = Math.max(place(b + 1, left, inner) - x, 1.5);
    if (data.clipped[b]) {
      draw.globalAlpha = 0.3 + 0.7 * data.clipped[b] / data.records[b];
      draw.fillStyle = css("--clip");
      draw.fillRect(Math.floor(x), strip - 8, Math.max(Math.floor(x + w) - Math.floor(x), 1), 8);
      draw.globalAlpha = 1;
    }
    for (const [counts, colour, up] of [[data.skipped, "--skip", 0], [data.rolled_back, "--bound", 9]]) {
      if (!counts[b]) continue;
      const m = x + w / 2;
      draw.fillStyle = css(colour);
      draw.beginPath();
      draw.moveTo(m - 4.5, top - 12 + up);
      draw.lineTo(m + 4.5, top - 12 + up);
      draw.lineTo(m, top - 4 + up);
      draw.fill();
    }
  }
  crosshair(draw, left, inner, top, strip);
  if (state.drag) {
    const a = place(Math.min(...state.drag), left, inner), z = place(Math.max(...state.drag) + 1, left, inner);
    draw.fillStyle = css("--band");
    draw.fillRect(a, top, z - a, bottom - top);
  }
}

function drawRate() {
  const { draw, width, height } = prepare(byId("rate"), 120);
  if (!bins) return;
  const left = gutter(), inner = width - left - 8, top = 8, bottom = height - 22;
  for (const share of [0, 0.5, 1]) tick(draw, `${share * 100}%`, bottom - share * (bottom - top), left, inner);
  stepAxis(draw, left, inner, height - 14);
  // over some bins: single steps are clipped or not, their rate is that of a neighbourhood
  const reach = Math.max(Math.ceil((state.to - state.from) / inner * 6), Math.round((state.to - state.from) / 60), 1);
  draw.fillStyle = css("--clip");
  draw.globalAlpha = 0.75;
  draw.beginPath();
  draw.moveTo(left, bottom);
  let clipped = 0, records = 0, tail = Math.max(0, state.from - reach);
  for (let b = tail; b < state.to; b++) {
    clipped += data.clipped[b]; records += data.records[b];
    while (tail < b - reach + 1) { clipped -= data.clipped[tail]; records -= data.records[tail]; tail++; }
    if (b < state.from) continue;
    const y = bottom - clipped / Math.max(records, 1) * (bottom - top);
    draw.lineTo(place(b, left, inner), y);
    draw.lineTo(place(b + 1, left, inner), y);
  }
  draw.lineTo(left + inner, bottom);
  draw.fill();
  draw.globalAlpha = 1;
  crosshair(draw, left, inner, top, bottom);
}

// --- names
const longest = data.names.reduce((a, b) => b.length > a.length ? b : a, "");
const [begin, end] = shared(data.names.map((name) => name.split(".")));
// how many parts all names begin with, and how many they end with; of each name one part at least is its own
function shared(names) {
  const most = names.reduce((least, parts) => Math.min(least, parts.length), Infinity) - 1;
  const isShared = (at) => names.every((parts) => parts.at(at) === names[0].at(at));
  let begin = 0, end = 0;
  while (tensors && begin < most && isShared(begin)) begin++;
  while (tensors && begin + end < most && isShared(-1 - end)) end++;
  return [begin, end];
}
const without = (begin, end) => (name) => name.split(".").slice(begin).slice(0, -end || undefined).join(".");
const forms = [without(0, 0), without(begin, 0), without(begin, end)];
const fits = (draw, words, room) => draw.measureText(words).width <= room;
const formFor = (draw, name, room) => forms.find((form) => fits(draw, form(name), room)) ?? forms.at(-1);
// "layers.7.self_attn.q_proj" becomes "l.7.self_attn.q_proj", "l.7.sa.q_proj": numbers and the end tell names apart
function shorten(draw, name, room) {
  const parts = name.split("."), isTooLong = () => !fits(draw, parts.join("."), room);
  for (let i = 0; i < parts.length - 1 && isTooLong(); i++) parts[i] = parts[i].replace(/(\p{L})\p{L}*|_/gu, "$1");
  const words = parts.join(".");
  if (!isTooLong()) return words;
  let keep = words.length;
  const cut = () => words.slice(0, Math.ceil(keep / 2)) + "…" + words.slice(words.length - Math.floor(keep / 2));
  while (keep > 2 && !fits(draw, cut(), room)) keep--;
  return cut();
}
function nameFirst() {
  const tile = byId("first"), draw = document.createElement("canvas").getContext("2d"), room = tile.parentNode.clientWidth;
  const { fontWeight, fontSize } = getComputedStyle(tile);
  draw.font = `${fontWeight} ${fontSize} ${css("--mono")}`;
  tile.textContent = shorten(draw, formFor(draw, tile.title, room)(tile.title), room);
}

// --- heat map
const TALLEST = 2000; // pixels that are drawn at a time: a browser limits a canvas, and each move of the cursor draws it anew
const heatPlace = { left: 0, inner: 0, top: 4, row: 6, above: 0 };
function drawHeat() {
  const rows = state.order.length, narrow = window.innerWidth <= 640;
  const row = Math.max(narrow ? 4 : 5, Math.min(20, Math.floor(420 / Math.max(rows, 1))));
  const whole = Math.max(rows * row, 20) + 24;
  byId("heat-rows").style.height = `${whole}px`; // in which the canvas stays where it is seen
  const { draw, width, height } = prepare(byId("heat"), Math.min(whole, TALLEST));
  if (!bins || !rows) return;
  const left = narrow ? 118 : 210, inner = Math.max(width - left - 8, 40), top = 4;
  const above = Math.max(Math.min(byId("heat-scroll").scrollTop, whole - height), 0);
  Object.assign(heatPlace, { left, inner, top, row, above });
  draw.translate(0, -above);
  const first = Math.max(Math.floor((above - top) / row), 0), last = Math.min(Math.ceil((above + height - top) / row), rows);
  const colours = palette();
  const columns = Math.min(Math.round(inner * (window.devicePixelRatio || 1)), 2400);
  const image = new ImageData(columns, last - first);
  const span = state.to - state.from;
  for (let r = first; r < last; r++) {
    const base = state.order[r] * bins;
    for (let x = 0; x < columns; x++) {
      const a = state.from + Math.floor(x / columns * span);
      const z = Math.max(a + 1, state.from + Math.floor((x + 1) / columns * span));
      let code = 0; // of the bins under one pixel the gravest: no spike is lost
      for (let b = a; b < z; b++) if (heat[base + b] > code) code = heat[base + b];
      const [red, green, blue] = colours[code], i = ((r - first) * columns + x) * 4;
      image.data[i] = red; image.data[i + 1] = green; image.data[i + 2] = blue; image.data[i + 3] = 255;
    }
  }
  const sheet = document.createElement("canvas");
  sheet.width = columns;
  sheet.height = last - first;
  sheet.getContext("2d").putImageData(image, 0, 0);
  draw.imageSmoothingEnabled = false;
  draw.drawImage(sheet, left, top + first * row, inner, (last - first) * row);
  draw.textAlign = "right";
  draw.textBaseline = "middle";
  draw.font = `${Math.min(row + 1, 11.5)}px ${css("--mono")}`;
  const each = row >= 10 ? 1 : Math.ceil(11 / row);
  if (each > 1) draw.font = `10.5px ${css("--mono")}`;
  const chosen = state.order.indexOf(state.row), room = left - 10;
  const form = formFor(draw, longest, room); // one for all rows
  for (let r = first; r < last; r++) {
    const isCrowded = r % each || (chosen >= 0 && Math.abs(r - chosen) < each);
    if (isCrowded && r !== chosen) continue;
    draw.fillStyle = r === chosen ? css("--ink") : css("--soft");
    draw.fillText(shorten(draw, form(data.names[state.order[r]]), room), left - 6, top + (r + 0.5) * row);
  }
  if (chosen >= 0) {
    draw.strokeStyle = css("--ink");
    draw.lineWidth = 1.5;
    draw.strokeRect(left - 0.75, top + chosen * row - 0.75, inner + 1.5, row + 1.5);
  }
  draw.font = "12px " + css("--font");
  crosshair(draw, left, inner, top, top + rows * row);
  stepAxis(draw, left, inner, top + rows * row + 7);
}
function drawLine() {
  const canvas = byId("line");
  canvas.classList.toggle("hidden", state.row < 0);
  if (state.row < 0 || !bins) return;
  const isNumber = (code) => code >= LOWEST && code <= HIGHEST;
  const { draw, width, height } = prepare(canvas, 140);
  const left = gutter(), inner = width - left - 8, top = 10, bottom = height - 22, base = state.row * bins;
  let low = Infinity, high = -Infinity;
  for (let b = state.from; b < state.to; b++) {
    const code = heat[base + b];
    if (isNumber(code)) { const e = Math.log10(normOf(code)); low = Math.min(low, e); high = Math.max(high, e); }
  }
  if (low > high) { low = data.low; high = data.high; }
  if (high - low < 0.5) { const m = (low + high) / 2; low = m - 0.25; high = m + 0.25; }
  const y = (e) => bottom - (e - low) / (high - low) * (bottom - top);
  logAxis(draw, low, high, y, left, inner);
  stepAxis(draw, left, inner, height - 14);
  draw.fillStyle = css("--skip");
  for (let b = state.from; b < state.to; b++) {
    if (heat[base + b] > HIGHEST) draw.fillRect(place(b + 0.5, left, inner) - 1, top, 2, bottom - top);
  }
  line(draw, left, inner, (b) => isNumber(heat[base + b]) ? y(Math.log10(normOf(heat[base + b]))) : null, css("--accent"));
  crosshair(draw, left, inner, top, bottom);
}

// --- what is chosen
function follow() {
  if (!bins) return;
  const words = tell(state.bin);
  byId("norm-readout").textContent = words;
  for (const id of ["norm", "rate"]) {
    byId(id).setAttribute("aria-valuemax", String(bins - 1));
    byId(id).setAttribute("aria-valuenow", String(state.bin));
    byId(id).setAttribute("aria-valuetext", words);
  }
  if (state.row >= 0) {
    byId("heat-readout").textContent =
      `${data.names[state.row]}, ${steps(state.bin)}: norm ${meaning(heat[state.row * bins + state.bin])}`;
    byId("line").setAttribute("aria-label", `Norm of ${data.names[state.row]}, by step`);
  }
}
let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawNorm(); drawRate(); drawHeat(); drawLine(); nameFirst(); follow();
    byId("closer").disabled = state.to - state.from <= 8;
    byId("all").disabled = byId("farther").disabled = state.to - state.from === bins;
  });
}
function look(from, to) {
  const span = Math.min(Math.max(Math.round(to - from), Math.min(8, bins)), bins);
  state.from = Math.min(Math.max(Math.round(from), 0), bins - span);
  state.to = state.from + span;
  redraw();
}
function zoom(by) {
  const span = (state.to - state.from) * by;
  look(state.bin + 0.5 - span / 2, state.bin + 0.5 + span / 2);
}
function go(bin) {
  state.bin = Math.min(Math.max(bin, 0), bins - 1);
  if (state.bin < state.from || state.bin >= state.to) {
    const half = (state.to - state.from) / 2;
    look(state.bin - half, state.bin + half);
  }
  redraw();
}
function binOfStep(step) {
  let a = 0, z = bins - 1;
  while (a < z) { const m = (a + z) >> 1; if (data.last[m] < step) a = m + 1; else z = m; }
  return a;
}

function arrange() {
  const wanted = byId("find").value.trim().toLowerCase();
  const all = byId("order").value === "worst" ? data.gravity : data.names.map((_, i) => i);
  state.order = all.filter((i) => data.names[i].toLowerCase().includes(wanted));
  if (!state.order.includes(state.row)) { state.row = -1; byId("heat-readout").textContent = state.order.length ? "" : "No tensor has such a name."; }
  redraw();
}

for (const id of ["norm", "rate"]) {
  const canvas = byId(id);
  const bin = (event) => binAt(event.offsetX, gutter(), canvas.clientWidth - gutter() - 8);
  canvas.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") state.drag = [bin(event), bin(event)]; go(bin(event)); });
  canvas.addEventListener("pointermove", (event) => {
    if (state.drag) state.drag[1] = bin(event);
    if (event.pointerType === "mouse") go(bin(event));
  });
  canvas.addEventListener("pointerup", () => {
    const drag = state.drag;
    state.drag = null;
    if (drag && Math.abs(drag[1] - drag[0]) >= 3) look(Math.min(...drag), Math.max(...drag) + 1); else redraw();
  });
  canvas.addEventListener("pointerleave", () => { state.drag = null; redraw(); });
}
function keys(event, rows) {
  const page = Math.max(1, Math.round((state.to - state.from) / 20));
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page };
  if (event.key in moves) go(state.bin + moves[event.key]);
  else if (event.key === "Home") go(0);
  else if (event.key === "End") go(bins - 1);
  else if (event.key === "+" || event.key === "=") zoom(0.5);
  else if (event.key === "-") zoom(2);
  else if (event.key === "Escape") look(0, bins);
  else if (rows && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
    const at = state.order.indexOf(state.row) + (event.key === "ArrowUp" ? -1 : 1);
    if (state.order.length) choose(state.order[Math.min(Math.max(at, 0), state.order.length - 1)]);
  } else return;
  event.preventDefault();
}
function choose(tensor) {
  state.row = tensor;
  const at = heatPlace.top + state.order.indexOf(tensor) * heatPlace.row, box = byId("heat-scroll");
  if (at < box.scrollTop || at > box.scrollTop + box.clientHeight - 30) box.scrollTop = at - box.clientHeight / 2;
  redraw();
}
for (const id of ["norm", "rate"]) byId(id).addEventListener("keydown", (event) => keys(event, false));
byId("heat").addEventListener("keydown", (event) => {
  if (state.row >= 0 || !event.key.startsWith("Arrow") || !state.order.length) return keys(event, true);
  choose(state.order[0]);
  event.preventDefault();
});
function underPointer(event) {
  const r = Math.floor((event.offsetY + heatPlace.above - heatPlace.top) / heatPlace.row);
  return { bin: binAt(event.offsetX, heatPlace.left, heatPlace.inner), tensor: state.order[r] };
}
byId("heat").addEventListener("click", (event) => {
  const { bin, tensor } = underPointer(event);
  if (tensor === undefined) return;
  state.row = tensor;
  go(bin);
});
byId("heat").addEventListener("pointermove", (event) => {
  const { bin, tensor } = underPointer(event);
  if (tensor === undefined || event.pointerType !== "mouse") return;
  byId("heat").title = `${data.names[tensor]}\n${steps(bin)}: norm ${meaning(heat[tensor * bins + bin])}`;
});
byId("heat-scroll").addEventListener("scroll", () => { if (byId("heat-rows").clientHeight > TALLEST) redraw(); });
byId("closer").addEventListener("click", () => zoom(0.5));
byId("farther").addEventListener("click", () => zoom(2));
byId("all").addEventListener("click", () => look(0, bins));
byId("find").addEventListener("input", arrange);
byId("order").addEventListener("change", arrange);

// --- tables
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-step], button[data-tensor]");
  if (!button) return;
  if (button.dataset.tensor !== undefined) {
    byId("find").value = "";
    arrange();
    choose(Number(button.dataset.tensor));
  }
  if (button.dataset.step !== undefined) go(binOfStep(Number(button.dataset.step)));
  byId(button.dataset.tensor !== undefined ? "heat-title" : "norm-title").scrollIntoView({ block: "start" });
});
byId("kind").addEventListener("change", () => {
  for (const row of document.querySelectorAll("#events tbody tr"))
    row.classList.toggle("hidden", byId("kind").value !== "" && row.dataset.kind !== byId("kind").value);
});
const more = byId("more");
if (more) more.addEventListener("click", () => {
  const open = more.getAttribute("aria-expanded") === "true";
  more.setAttribute("aria-expanded", String(!open));
  more.textContent = open ? more.dataset.more : more.dataset.fewer;
  for (const row of document.querySelectorAll("#tensors tr[data-rest]")) row.classList.toggle("hidden", open);
});
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
  const falling = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const value = (row) => { const cell = row.cells[column]; return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value); };
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
    return falling ? -order : order;
  });
  table.tBodies[0].append(...rows);
});

// --- light and dark
const themes = [["", "Auto", "Colours: as the system has them"], ["light", "Light", "Colours: light"], ["dark", "Dark", "Colours: dark"]];
let theme = 0;
byId("theme").addEventListener("click", () => {
  theme = (theme + 1) % themes.length;
  document.documentElement.dataset.theme = themes[theme][0];
  byId("theme").textContent = themes[theme][1];
  byId("theme").setAttribute("aria-label", themes[theme][2]);
  paintScale();
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
function paintScale() {
  const { draw, width, height } = prepare(byId("scale"), 12);
  for (let x = 0; x < width; x++) {
    draw.fillStyle = `rgb(${ramp(x / width).join(",")})`;
    draw.fillRect(x, 0, 1.5, height);
  }
  byId("low").textContent = shown(Number((10 ** data.low).toPrecision(2)));
  byId("high").textContent = shown(Number((10 ** data.high).toPrecision(2)));
}
new ResizeObserver(redraw).observe(document.body);
state.bin = Math.max(data.worst_bin, 0);
arrange();
paintScale();
