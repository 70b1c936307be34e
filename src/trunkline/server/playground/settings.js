// What a request is asked with: one plain object, kept between visits, and shared by links. Never the key.

import { get } from "./api.js";

export const EMPTY = {
  system: "",
  params: {}, // only what differs from the server's defaults
  stop: [],
  thinking: "default",
  schemaOn: false,
  schema: "",
  toolsOn: false,
  tools: "",
  toolChoice: "auto",
  tokens: true, // ask for log-probabilities
  top: 5,
};

// name: [label, chat's name, what it does, step, slider's bounds]
export const PARAMETERS = {
  temperature: ["Temperature", "temperature", "0 always takes the likeliest token; higher varies more", 0.05, [0, 2]],
  top_p: ["Top p", "top_p", "Keeps the likeliest tokens that make up this share", 0.01, [0.01, 1]],
  top_k: ["Top k", "top_k", "Keeps so many of the likeliest tokens; -1 keeps all", 1, null],
  min_p: ["Min p", "min_p", "Drops tokens below this share of the likeliest one", 0.01, [0, 1]],
  frequency_penalty: ["Frequency penalty", "frequency_penalty", "Lowers tokens by how often they came", 0.1, [-2, 2]],
  presence_penalty: ["Presence penalty", "presence_penalty", "Lowers tokens that came at all", 0.1, [-2, 2]],
  repetition_penalty: ["Repetition penalty", "repetition_penalty", "Above 1 lowers what was in prompt or output", 0.05, [0.05, 2]],
  max_new_tokens: ["Most tokens", "max_tokens", "Ends the answer after so many", 1, null],
  min_new_tokens: ["Fewest tokens", "min_tokens", "No end before so many", 1, null],
  sampling_seed: ["Seed", "seed", "The same seed gives the same answer; empty draws one", 1, null],
  n: ["Answers", "n", "So many at once, from one prompt", 1, null],
};
export const SEED = /^-?\d{1,19}$/;
export const GROUPS = [
  ["Sampling", ["temperature", "top_p", "top_k", "min_p", "sampling_seed"]],
  ["Length", ["max_new_tokens", "min_new_tokens", "n"]],
  ["Penalties", ["frequency_penalty", "presence_penalty", "repetition_penalty"]],
];

let about = null;
export async function loadAbout() {
  about = await get("v1/playground/about");
  return about;
}
export const aboutServer = () => about;
export const bounds = (name) => about?.parameters[name] ?? { default: null, raw: null, low: null, high: null };

const STORE = "trunkline.settings";
export function load(name, fallback) {
  try {
    const stored = JSON.parse(localStorage.getItem(`${STORE}.${name}`));
    return clean(stored ?? fallback);
  } catch {
    return clean(fallback);
  }
}
export function save(name, settings) {
  try {
    localStorage.setItem(`${STORE}.${name}`, JSON.stringify(settings));
  } catch {
    /* a full or forbidden store: the settings then last as long as the page */
  }
}

// Only known fields of known kinds: links come from anywhere.
export function clean(given) {
  const settings = structuredClone(EMPTY);
  if (typeof given !== "object" || given === null) return settings;
  for (const [name, fallback] of Object.entries(EMPTY)) {
    if (typeof given[name] === typeof fallback && Array.isArray(given[name]) === Array.isArray(fallback)) settings[name] = given[name];
  }
  settings.params = {};
  for (const [name, value] of Object.entries(given.params ?? {})) {
    if (name in PARAMETERS && (Number.isFinite(value) || (name === "sampling_seed" && SEED.test(value)))) settings.params[name] = value;
  }
  settings.stop = settings.stop.filter((one) => typeof one === "string").slice(0, 32);
  if (!["default", "on", "off"].includes(settings.thinking)) settings.thinking = "default";
  if (!["auto", "none", "required"].includes(settings.toolChoice)) settings.toolChoice = "auto";
  settings.top = Math.min(20, Math.max(1, Math.round(settings.top) || 5));
  return settings;
}

export function toLink(view, data) {
  const bytes = new TextEncoder().encode(JSON.stringify(data));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return `${location.href.split("#")[0]}#${view}/${text}`;
}
export function fromLink(text) {
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    return null;
  }
}
// Only what differs from nothing: short links.
export function slim(settings) {
  return Object.fromEntries(Object.entries(settings).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(EMPTY[name])));
}

export class InputError extends Error {
  constructor(message, code, param) {
    super(message);
    Object.assign(this, { code, param, name: code });
  }
}
function parsed(text, what, param) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new InputError(`${what} is not valid JSON (${error.message}): correct it in the settings`, "invalid_json", param);
  }
}
export const schemaOf = (settings) => (settings.schemaOn ? parsed(settings.schema, "The schema", "response_format") : null);

function toolsOf(settings) {
  if (!settings.toolsOn || !settings.tools.trim()) return null;
  const tools = parsed(settings.tools, "The list of tools", "tools");
  const list = Array.isArray(tools) ? tools : [tools];
  return list.map((tool) => (tool.function ? tool : { type: "function", function: tool }));
}

// The body of POST /v1/chat/completions.
export function chatBody(settings, messages) {
  const body = { model: about?.model ?? "default", messages: settings.system.trim() ? [{ role: "system", content: settings.system }, ...messages] : messages };
  for (const [name, value] of Object.entries(settings.params)) body[PARAMETERS[name][1]] = value;
  if (settings.stop.length) body.stop = settings.stop;
  if (settings.thinking !== "default") body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  const schema = schemaOf(settings);
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = toolsOf(settings);
  if (tools) {
    body.tools = tools;
    if (settings.toolChoice !== "auto") body.tool_choice = settings.toolChoice;
  }
  if (settings.tokens) Object.assign(body, { logprobs: true, top_logprobs: settings.top, return_prefix_miss: true });
  return body;
}

// The body of POST /generate.
export function rawBody(settings, text) {
  const params = { ...settings.params };
  if (settings.stop.length) params.stop = settings.stop;
  const schema = schemaOf(settings);
  if (schema) params.json_schema = JSON.stringify(schema);
  const body = { text, sampling_params: params, return_forced: true };
  if (settings.tokens) Object.assign(body, { return_logprob: true, top_logprobs_num: settings.top, return_text_in_logprobs: true, return_prefix_miss: true });
  return body;
}
