// The map of one worker's KV cache: a canvas with a cell a block. Only cells that changed are painted again.

import { CACHED, FREE, holders } from "./state.js";

const MAX_PITCH = 18, MIN_PITCH = 4, GOOD_HEIGHT = 380; // pixels of CSS
const COLOURS = ["free", "cached", "owned", "shared2", "shared3", "shared4"];
const DIM = 8, RING = 16, UNKNOWN = 255; // beside the colour, in what a cell was painted with

/** Which of COLOURS a cell has. */
function colourOf(value) {
  if (value === FREE) return 0;
  return value === CACHED ? 1 : Math.min(value, 4) + 1;
}

/** How a block stands, in words. */
function wordsFor(value) {
  if (value === FREE) return "Free: it holds nothing.";
  if (value === CACHED) return "Cached: nobody holds it, but its prefix can be found again.";
  return value === 1 ? "Owned by one sequence." : `Shared by ${value} sequences.`;
}

export class BlockMap {
  /** `onPoint(ids)` is called with the requests that are pointed at, or null. */
  constructor(tip, onPoint) {
    this.element = document.createElement("figure");
    this.caption = document.createElement("figcaption");
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "map of blocks");
    this.element.append(this.caption, this.canvas);
    this.context = this.canvas.getContext("2d");
    this.tip = tip;
    this.onPoint = onPoint;
    this.worker = null;
    this.requests = [];
    this.painted = new Uint8Array(0);
    this.lit = null; // ids of requests to show, the rest recedes
    this.at = -1; // the block that is pointed at
    this.#listen();
    new ResizeObserver(() => this.#fit()).observe(this.element);
  }

  /** A new state of the worker. */
  update(worker, requests) {
    const resized = this.worker?.num_blocks !== worker.num_blocks;
    this.worker = worker;
    this.requests = requests;
    const tokens = (worker.num_blocks * worker.block_size).toLocaleString("en");
    const devices = worker.ranks > 1 ? `${worker.ranks} × ${worker.device}` : worker.device;
    this.caption.textContent =
      `${worker.name} · ${devices} · ${worker.num_blocks.toLocaleString("en")} blocks of ` +
      `${worker.block_size} = ${tokens} tokens · ${(100 * worker.sharing).toFixed(0)} % saved by sharing`;
    this.canvas.setAttribute("aria-label", `KV cache of ${worker.name}; arrow keys move from block to block`);
    if (resized) this.#fit();
    if (this.at >= 0) this.#point(this.at);
    this.paint();
  }

  /** Show the blocks of these requests and let the others recede; null shows all alike. */
  light(ids) {
    this.lit = ids;
    this.paint();
  }

  /** Colours from the style sheet, after a change between light and dark too. */
  recolour() {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = COLOURS.map(value);
    this.dimmed = this.colours.map((colour) => `color-mix(in srgb, ${colour} 38%, ${value("card")})`);
    this.ring = value("ink");
    this.painted.fill(UNKNOWN);
    this.paint();
  }

  /** Paint what is not yet as it should be. */
  paint() {
    if (!this.worker || !this.columns) return;
    const lit = this.lit ? this.#blocksOf(this.lit) : null;
    const { cells } = this.worker;
    const changed = new Map(); // blocks by look: a change of the fill style is what takes long
    for (let block = 0; block < cells.length; block++) {
      const mood = lit && cells[block] !== FREE && !lit[block] ? DIM : 0;
      const look = colourOf(cells[block]) | mood | (block === this.at ? RING : 0);
      if (look === this.painted[block]) continue;
      this.painted[block] = look;
      if (!changed.has(look)) changed.set(look, []);
      changed.get(look).push(block);
    }
    for (const [look, blocks] of changed) this.#paintCells(blocks, look);
  }

  #paintCells(blocks, look) {
    const { context, pitch } = this;
    const size = pitch - (pitch > 7 ? 2 : 1);
    context.fillStyle = (look & DIM ? this.dimmed : this.colours)[look & 7];
    for (const block of blocks) {
      const x = (block % this.columns) * pitch, y = Math.floor(block / this.columns) * pitch;
      if (pitch > 9) {
        context.clearRect(x, y, pitch, pitch);
        context.beginPath();
        context.roundRect(x, y, size, size, 3);
        context.fill();
      } else {
        context.fillRect(x, y, size, size); // tens of thousands: paths would take a fifth of a second
      }
      if (look & RING) {
        context.strokeStyle = this.ring;
        context.lineWidth = pitch > 7 ? 2 : 1;
        context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
      }
    }
  }

  /** Cells as large as they can be without making the map too tall, and a canvas for them. */
  #fit() {
    const width = this.element.clientWidth;
    if (!this.worker || !width) return;
    const total = this.worker.num_blocks;
    let pitch = MAX_PITCH;
    const rows = () => Math.ceil(total / Math.max(1, Math.floor(width / pitch)));
    while (pitch > MIN_PITCH && rows() * pitch > GOOD_HEIGHT) pitch--;
    this.pitch = pitch;
    this.columns = Math.max(1, Math.floor(width / pitch));
    const height = rows() * pitch, scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.columns * pitch * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.width = `${this.columns * pitch}px`;
    this.canvas.style.height = `${height}px`;
    this.canvas.dataset.pitch = pitch;
    this.canvas.dataset.columns = this.columns;
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.painted = new Uint8Array(total);
    this.recolour();
  }

  #blocksOf(ids) {
    const marks = new Uint8Array(this.worker.num_blocks);
    for (const request of this.requests) {
      if (request.worker !== this.worker.name || !ids.has(request.id)) continue;
      for (let i = 0; i < request.blocks.length; i += 2) {
        marks.fill(1, request.blocks[i], request.blocks[i] + request.blocks[i + 1]);
      }
    }
    return marks;
  }

  // ------------------------------------------------------------------------------------ pointing at blocks

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => {
      const column = Math.floor(event.offsetX / this.pitch), row = Math.floor(event.offsetY / this.pitch);
      const block = row * this.columns + column;
      if (column < 0 || column >= this.columns || block < 0 || block >= this.worker.num_blocks) this.#leave();
      else this.#point(block);
    });
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("blur", () => this.#leave());
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    if (event.key === "Escape") return this.#leave();
    const last = this.worker.num_blocks - 1;
    const goals = {
      ArrowRight: this.at + 1, ArrowLeft: this.at - 1, ArrowDown: this.at + this.columns,
      ArrowUp: this.at - this.columns, Home: 0, End: last,
    };
    if (!(event.key in goals)) return;
    event.preventDefault();
    const goal = this.at < 0 && event.key !== "End" ? 0 : goals[event.key];
    if (goal >= 0 && goal <= last) this.#point(goal);
  }

  #point(block) {
    this.at = block;
    const owners = holders(this.requests, this.worker.name, block);
    const lines = [element("strong", `Block ${block}`), element("p", wordsFor(this.worker.cells[block]))];
    for (const request of owners.slice(0, 6)) {
      const line = element("p", "", "holder");
      const tokens = `${request.prompt_tokens} prompt + ${request.output_tokens} output tokens`;
      const facts = `${request.state}, ${tokens}`;
      line.append(element("code", request.id), element("span", facts));
      lines.push(line);
    }
    if (owners.length > 6) lines.push(element("p", `and ${owners.length - 6} more`));
    this.tip.replaceChildren(...lines);
    this.#placeTip(block);
    this.onPoint(owners.length ? new Set(owners.map((request) => request.id)) : null);
    this.paint();
  }

  #placeTip(block) {
    const box = this.canvas.getBoundingClientRect(), { tip, pitch } = this;
    tip.hidden = false;
    tip.style.left = "0"; // its width must not depend on where it was
    const x = box.left + (block % this.columns) * pitch + pitch;
    const y = box.top + Math.floor(block / this.columns) * pitch + pitch + 6;
    const left = Math.max(8, Math.min(x, document.documentElement.clientWidth - tip.offsetWidth - 12));
    const above = y + tip.offsetHeight > innerHeight - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.max(8, above ? y - pitch - 12 - tip.offsetHeight : y)}px`;
  }

  #leave() {
    if (this.at < 0) return;
    this.at = -1;
    this.tip.hidden = true;
    this.onPoint(null);
    this.paint();
  }
}

function element(name, text, kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
