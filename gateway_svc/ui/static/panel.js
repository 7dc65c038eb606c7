// Figures beside the map: tokens per second with its last minute, queue, batch, cache, and the requests.

import { CACHED, FREE, count } from "./state.js";
import { own } from "./chat.js";

const WINDOW_US = 2e6, MINUTE_US = 60e6, MAX_ROWS = 40;
const byId = (id) => document.getElementById(id);
const spark = byId("spark");
let past = []; // of a minute: when, tokens so far, rate

/** Show a state's figures. */
export function showFigures(state) {
  const rate = rateOf(state);
  text("model", state.model);
  text("rate", rate >= 100 ? Math.round(rate).toLocaleString("en") : rate.toFixed(1));
  text("queue", state.waiting);
  const slots = sum(state.workers, "slots"), maxSlots = sum(state.workers, "max_slots");
  text("batch", slots);
  text("batch-note", `of ${maxSlots} rows run`);
  text("queue-note", state.preemptions ? `wait, ${state.preemptions} preempted` : "requests wait");
  const totals = tally(state.workers), blocks = sum(state.workers, "num_blocks");
  const held = totals.owned + totals.shared;
  text("held", `${blocks ? ((100 * held) / blocks).toFixed(held && held < blocks / 10 ? 1 : 0) : 0} %`);
  text("held-note", `${held.toLocaleString("en")} of ${blocks.toLocaleString("en")} blocks`);
  for (const [name, value] of Object.entries(totals)) {
    byId("legend").querySelector(`[data-state=${name}] b`).textContent = value.toLocaleString("en");
  }
  drawSpark();
}

/** Blocks by state. */
function tally(workers) {
  const totals = { free: 0, cached: 0, owned: 0, shared: 0 };
  for (const { cells } of workers) {
    for (const value of cells) {
      totals[value === FREE ? "free" : value === CACHED ? "cached" : value === 1 ? "owned" : "shared"]++;
    }
  }
  return totals;
}

/** Tokens per second over the last two seconds. */
function rateOf({ unix_us: now, generation_tokens: tokens }) {
  // A scheduler that was started again counts from zero.
  if (past.length && tokens < past.at(-1).tokens) past = [];
  past = past.filter(({ when }) => when > now - MINUTE_US);
  const from = past.find(({ when }) => when >= now - WINDOW_US);
  const rate = from && now > from.when ? ((tokens - from.tokens) * 1e6) / (now - from.when) : 0;
  past.push({ when: now, tokens, rate });
  return rate;
}

function drawSpark() {
  const width = spark.clientWidth, height = spark.clientHeight, scale = devicePixelRatio || 1;
  if (!width || !past.length) return;
  spark.width = width * scale;
  spark.height = height * scale;
  const context = spark.getContext("2d");
  context.scale(scale, scale);
  const top = Math.max(1, ...past.map(({ rate }) => rate)), now = past.at(-1).when;
  const x = ({ when }) => width - ((now - when) / MINUTE_US) * width;
  const y = ({ rate }) => height - 2 - (rate / top) * (height - 6);
  context.beginPath();
  for (const point of past) context.lineTo(x(point), y(point));
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = 2;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(width, height);
  context.lineTo(x(past[0]), height);
  context.globalAlpha = 0.14;
  context.fill();
}

// --------------------------------------------------------------------------------------- the requests

const rows = new Map();

/** Show the requests; `onPoint(ids)` is called with the one that is pointed at, or null. */
export function showRequests(requests, onPoint) {
  const shown = requests.slice(0, MAX_ROWS);
  const ids = new Set(shown.map(({ id }) => id));
  for (const [id, row] of rows) {
    if (ids.has(id)) continue;
    if (row.matches(":hover, :focus")) onPoint(null);
    row.remove();
    rows.delete(id);
  }
  for (const request of shown) {
    if (!rows.has(request.id)) rows.set(request.id, newRow(request, onPoint));
    fill(rows.get(request.id), request);
  }
  byId("requests-empty").hidden = shown.length > 0;
  text("requests-note", requests.length > MAX_ROWS ? `the first ${MAX_ROWS} of ${requests.length}` : "");
}

/** Mark the rows of these requests; null marks none. */
export function markRequests(ids) {
  for (const [id, row] of rows) row.classList.toggle("lit", Boolean(ids?.has(id)));
}

function newRow(request, onPoint) {
  const row = document.createElement("tr");
  row.tabIndex = 0;
  const name = document.createElement("th");
  name.scope = "row";
  name.append(document.createElement("code"));
  name.firstChild.textContent = name.title = request.id;
  if (own.has(request.id)) name.append(" (this chat)");
  row.append(name);
  for (let i = 0; i < 6; i++) row.append(document.createElement("td"));
  for (let i = 2; i < 7; i++) row.children[i].className = "n";
  const only = new Set([request.id]);
  for (const kind of ["pointerenter", "focus"]) row.addEventListener(kind, () => onPoint(only));
  for (const kind of ["pointerleave", "blur"]) row.addEventListener(kind, () => onPoint(null));
  byId("requests").append(row);
  return row;
}

function fill(row, request) {
  const state = row.children[1];
  state.textContent = request.state;
  state.dataset.state = request.state;
  state.title = request.why;
  const samples = request.samples > 1 ? ` in ${request.samples}` : "";
  const values = [
    request.prompt_tokens, request.cached_tokens, `${request.output_tokens}${samples}`, count(request.blocks),
    `${(request.age_us / 1e6).toFixed(1)} s`,
  ];
  values.forEach((value, i) => (row.children[i + 2].textContent = value));
}

const sum = (items, name) => items.reduce((total, item) => total + item[name], 0);

function text(id, value) {
  byId(id).textContent = value;
}
