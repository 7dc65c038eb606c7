// Puts the page together: the chat on one side, the server's state on the other.

import { startChat } from "./chat.js";
import { BlockMap } from "./map.js";
import { markRequests, showFigures, showRequests } from "./panel.js";
import { follow } from "./state.js";

const maps = new Map();
const place = document.getElementById("maps");
const tip = document.getElementById("tip");
const link = document.getElementById("link");
const trouble = document.getElementById("trouble");

function onState(state) {
  link.dataset.state = state.workers.length ? "live" : "starting";
  link.textContent = state.workers.length ? "Live" : "Waiting for a worker";
  document.getElementById("maps-empty").hidden = state.workers.length > 0;
  for (const [name, map] of maps) {
    if (state.workers.some((worker) => worker.name === name)) continue;
    map.element.remove();
    maps.delete(name);
  }
  for (const worker of state.workers) {
    if (!maps.has(worker.name)) {
      maps.set(worker.name, new BlockMap(tip, point));
      place.append(maps.get(worker.name).element);
    }
    maps.get(worker.name).update(worker, state.requests);
  }
  showFigures(state);
  showRequests(state.requests, point);
}

function onTrouble(words) {
  trouble.hidden = !words;
  if (trouble.textContent !== words) trouble.textContent = words;
  if (!words) return;
  link.dataset.state = "lost";
  link.textContent = "Not live";
}

function point(ids) {
  for (const map of maps.values()) map.light(ids);
  markRequests(ids);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const map of maps.values()) map.recolour();
});
startChat();
follow(onState, onTrouble);
