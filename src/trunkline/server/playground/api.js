// Talking to the server: the key, errors, streams, and whether it can be reached.

import { button, h, icon } from "./dom.js";

const KEY = "trunkline.key";
const BASE = new URL("./", document.baseURI);
const LARGE_SEED = /"(seed|sampling_seed)":"(-?\d+)"/g; // kept as text up to here: a number would lose digits
const listeners = new Set();
let reachable = "checking"; // "up", "down", "dead", "key", "checking"

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export function onState(listener) {
  listeners.add(listener);
  listener(reachable);
}
export const state = () => reachable;
function setState(next) {
  if (next === reachable) return;
  reachable = next;
  for (const listener of listeners) listener(next);
}

export class ApiError extends Error {
  constructor(status, { message, code, param, pointer } = {}) {
    super(message || `the server answered with status ${status}`);
    Object.assign(this, { status, code: code || `http_${status}`, param, pointer });
  }
}

const FIXES = {
  unreachable: "Is the server still running? The page tries again by itself.",
  invalid_api_key: "Enter the server's API key (the key sign at the top).",
  admin_key_needed: "Enter the administrator's key instead (the key sign at the top).",
  queue_full: "Wait a moment, then try again.",
  engine_dead: "The engine restarts by itself; try again in a few seconds.",
  no_chat_template: "This model completes text: use Complete.",
  context_length_exceeded: "Shorten the conversation, or lower the output limit.",
  unsupported_field: "Take this setting back to its default.",
  interrupted: "What came so far is kept. Try again for the whole answer.",
};

function headers(extra) {
  const own = key.get();
  return { accept: "application/json", ...extra, ...(own ? { authorization: `Bearer ${own}` } : {}) };
}

async function send(path, { body, signal, method } = {}) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers: headers(body === undefined ? {} : { "content-type": "application/json" }),
      body: body === undefined ? undefined : JSON.stringify(body).replace(LARGE_SEED, '"$1":$2'),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    setState("down");
    throw new ApiError(0, { code: "unreachable", message: "the server can't be reached" });
  }
  if (!response.ok) {
    const refusal = await response.json().catch(() => ({}));
    const error = new ApiError(response.status, refusal.error);
    setState(response.status === 401 ? "key" : error.code === "engine_dead" ? "dead" : "up");
    throw error;
  }
  setState("up");
  return response;
}

export const get = async (path, options) => (await send(path, options)).json();
// Integers of more than 15 digits as text, since numbers here can't hold them.
export const getExact = async (path) => JSON.parse((await (await send(path)).text()).replace(/([:[,]\s*)(-?\d{16,})(?=\s*[,}\]])/g, '$1"$2"'));
export const post = async (path, body, options) => (await send(path, { ...options, body })).json();

// Yields the parsed events of a stream. What is cut off on the way is an error, never a short answer.
export async function* stream(path, body, signal) {
  const response = await send(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      setState("down");
      throw new ApiError(0, { code: "interrupted", message: "the connection broke while the answer came" });
    }
    if (part.done) throw new ApiError(0, { code: "interrupted", message: "the answer ended early" });
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.status ?? 500, event.error);
      yield event;
    }
  }
}

// What went wrong, why, and what to do.
export function errorCard(error, retry) {
  const known = error instanceof ApiError;
  const [cause, ...more] = String(error.message).split(/: (?=[a-z][^:()"]{0,160}$)/);
  const fix = [more.join(": "), FIXES[error.code]].filter(Boolean).join(". ");
  return h(
    "div",
    { class: "error", role: "alert" },
    h("p", { class: "error-cause" }, cause),
    fix && h("p", { class: "error-fix" }, fix.charAt(0).toUpperCase() + fix.slice(1)),
    h(
      "p",
      { class: "error-code" },
      h("code", null, known ? error.code : error.name),
      error.param && h("span", null, " in ", h("code", null, error.param)),
      error.pointer && h("span", null, " at ", h("code", null, error.pointer)),
      error.status ? ` · status ${error.status}` : "",
    ),
    retry && button("again", "Try again", retry, { text: true, kind: "small" }),
  );
}

export const busyMark = () => h("span", { class: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i"));
export { icon };

let waiting = null;
// While the server can't be reached, look for it now and then.
export function watchServer() {
  const look = async () => {
    if ((state() === "down" || state() === "dead") && !document.hidden) {
      try {
        await get("health");
      } catch {
        /* the state says it */
      }
    }
    waiting = setTimeout(look, 2000);
  };
  clearTimeout(waiting);
  waiting = setTimeout(look, 2000);
}
