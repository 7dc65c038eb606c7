// Calls to the gateway: its token, and server-sent events over fetch (EventSource cannot send a token).

const KEY = "pagoda-token";
const dialog = document.getElementById("token-dialog");
const form = document.getElementById("token-form");
const field = document.getElementById("token");
let asking = null;

/** The response to a call. Asks for the token, as often as it takes, where the gateway wants one. */
export async function call(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(token ? { authorization: `Bearer ${token}` } : {}) };
    const response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
    if (response.status !== 401) return response;
    // Another call may have got a new token while this one was on its way.
    if (token === sessionStorage.getItem(KEY)) await ask(Boolean(token));
  }
}

/** The data of each event, as it comes. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

/** What went wrong, in words. */
export async function problem(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
}

function ask(refused) {
  document.getElementById("token-wrong").hidden = !refused;
  asking ??= new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value.trim());
      field.value = "";
      asking = null;
      dialog.close();
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault(); // nothing works without it
    dialog.showModal();
    field.focus();
  });
  return asking;
}
