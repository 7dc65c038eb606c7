// The server's state as it comes: followed while the page is visible, decoded for the map.

import { call, events, problem } from "./api.js";

export const FREE = 0, CACHED = -1;
const RETRY_MS = 1500;

/** Calls onState with each state, and onTrouble with words that are empty when all is well; does not end. */
export async function follow(onState, onTrouble) {
  for (;;) {
    await visible();
    const stop = new AbortController();
    const leave = () => document.hidden && stop.abort();
    document.addEventListener("visibilitychange", leave);
    try {
      const response = await call("ui/state", { signal: stop.signal });
      if (!response.ok) throw new Error(await problem(response));
      for await (const data of events(response)) {
        const state = JSON.parse(data);
        onTrouble(state.error ?? "");
        if (!state.error) onState(decode(state));
      }
      onTrouble("The server ended the connection; trying again.");
    } catch (error) {
      // A TypeError is what fetch throws when there is nobody to talk to.
      const words = error instanceof TypeError ? "The server cannot be reached; trying again." : error.message;
      if (!stop.signal.aborted) onTrouble(words);
    } finally {
      document.removeEventListener("visibilitychange", leave);
    }
    await new Promise((resolve) => setTimeout(resolve, stop.signal.aborted ? 0 : RETRY_MS));
  }
}

/** Requests that hold a block. */
export function holders(requests, worker, block) {
  return requests.filter((request) => request.worker === worker && holds(request.blocks, block));
}

/** How many blocks runs of first and count name. */
export function count(runs) {
  let sum = 0;
  for (let i = 1; i < runs.length; i += 2) sum += runs[i];
  return sum;
}

function holds(runs, block) {
  for (let i = 0; i < runs.length; i += 2) {
    if (block >= runs[i] && block < runs[i] + runs[i + 1]) return true;
  }
  return false;
}

/** The same state with every worker's cells unrolled: one number a block. */
function decode(state) {
  for (const worker of state.workers) {
    const cells = new Int32Array(worker.num_blocks);
    let at = 0;
    for (let i = 0; i < worker.cells.length; i += 2) {
      cells.fill(worker.cells[i], at, at += worker.cells[i + 1]);
    }
    worker.cells = cells;
  }
  return state;
}

function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", function shown() {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", shown);
      resolve();
    });
  });
}
