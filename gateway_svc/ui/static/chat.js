// The chat: a conversation that lives in this page and nowhere else.

import { call, events, problem } from "./api.js";

const log = document.getElementById("log");
const empty = document.getElementById("chat-empty");
const prompt = document.getElementById("prompt");
const send = document.getElementById("send");
const stop = document.getElementById("stop");
const number = (id) => document.getElementById(id).valueAsNumber;

let messages = [];
let running = null; // what stops the answer that is being written

/** Ids of this page's own requests, for the map and the table. */
export const own = new Set();

export function startChat() {
  document.getElementById("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (prompt.value.trim() && !running) say(prompt.value.trim());
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    document.getElementById("composer").requestSubmit();
  });
  stop.addEventListener("click", () => running?.abort());
  document.getElementById("new-chat").addEventListener("click", () => {
    running?.abort();
    messages = [];
    log.replaceChildren(empty);
    prompt.focus();
  });
}

async function say(text) {
  const conversation = messages;
  conversation.push({ role: "user", content: text });
  prompt.value = "";
  add("user", text);
  const bubble = add("assistant", "");
  const stopper = (running = new AbortController());
  bubble.dataset.state = "waiting";
  log.setAttribute("aria-busy", "true");
  send.disabled = true;
  stop.hidden = false;
  const answer = { text: "", begun: performance.now(), first: 0, last: 0, usage: null, reason: null };
  let trouble = "";
  try {
    await receive(conversation, answer, bubble, stopper.signal);
  } catch (error) {
    const lost = error instanceof TypeError ? "The server cannot be reached." : error.message;
    trouble = stopper.signal.aborted ? "Stopped." : lost;
  }
  // What could not be answered is not part of the conversation; what was stopped halfway is.
  if (answer.text) conversation.push({ role: "assistant", content: answer.text });
  else conversation.pop();
  bubble.dataset.state = trouble && trouble !== "Stopped." ? "failed" : "done";
  note(bubble, trouble || facts(answer));
  log.removeAttribute("aria-busy");
  send.disabled = false;
  stop.hidden = true;
  running = null;
}

async function receive(conversation, answer, bubble, signal) {
  // crypto.randomUUID is not there on plain HTTP from another machine.
  const drawn = crypto.getRandomValues(new Uint32Array(2));
  const id = `ui-${[...drawn].map((part) => part.toString(16).padStart(8, "0")).join("")}`;
  own.add(id);
  const body = {
    messages: conversation,
    request_id: id,
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
  };
  const headers = { "content-type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await call("v1/chat/completions", options);
  if (!response.ok) throw new Error(await problem(response));
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    answer.usage = chunk.usage ?? answer.usage;
    answer.reason = chunk.choices[0]?.finish_reason ?? answer.reason;
    const text = chunk.choices[0]?.delta.content;
    if (!text) continue;
    answer.last = performance.now();
    answer.first ||= answer.last;
    answer.text += text;
    bubble.dataset.state = "streaming";
    show(() => bubble.firstChild.append(text));
  }
  throw new Error("The server ended the connection before the answer was complete.");
}

function facts({ begun, first, last, usage, reason }) {
  if (!usage || !first) return "No text was generated.";
  const parts = [`${usage.completion_tokens} tokens`, `first after ${((first - begun) / 1000).toFixed(2)} s`];
  if (last > first) {
    parts.splice(1, 0, `${(((usage.completion_tokens - 1) * 1000) / (last - first)).toFixed(1)} a second`);
  }
  const cached = usage.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens from cache`);
  if (reason === "length") parts.push("cut at its length");
  return parts.join(" · ");
}

function add(role, text) {
  const bubble = document.createElement("div");
  bubble.className = `said ${role}`;
  const content = document.createElement("p");
  content.textContent = text;
  bubble.append(content);
  empty.remove();
  show(() => log.append(bubble), role === "user");
  return bubble;
}

function note(bubble, text) {
  const small = document.createElement("small");
  small.textContent = text;
  show(() => bubble.append(small));
}

/** Change the log; stay at its end for those who are there. */
function show(change, always = false) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (always || atEnd) log.scrollTop = log.scrollHeight;
}
