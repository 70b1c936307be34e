// What came out: reasoning, text or JSON, tool calls, tokens, figures. Shared by all views.

import { errorCard } from "./api.js";
import { button, copyText, duration, h, icon, number, plural } from "./dom.js";
import { markdown } from "./markdown.js";
import { violations } from "./schema.js";
import { promptView, tokenView } from "./tokens.js";

const busy = () => h("span", { class: "dots", role: "img", "aria-label": "Waiting for the first token" }, h("i"), h("i"), h("i"));

export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return null;
  }
}

// JSON against its schema: the value, and whether it keeps to it.
export function jsonResult(text, schema, done) {
  const value = pretty(text);
  const wrong = value === null ? ["The answer is not whole JSON"] : violations(schema, JSON.parse(text));
  return h(
    "div", { class: "json-result" },
    done && h("p", { class: `verdict ${wrong.length ? "bad" : "good"}` }, icon(wrong.length ? "close" : "check"), wrong.length ? wrong.slice(0, 3).join("; ") : "Valid against the schema"),
    h("pre", { tabindex: "0" }, h("code", null, value ?? text)),
  );
}

export function callCard(call) {
  const view = pretty(call.arguments);
  return h("div", { class: "call" }, h("p", { class: "call-name" }, icon("branch"), h("b", null, call.name || "…"), h("span", { class: "muted small" }, "tool call")), h("pre", { tabindex: "0" }, h("code", null, view ?? call.arguments)));
}

// An answer's body. `look` is "text" or "tokens".
export function answerBody(one, { look = "text", schema = null, prompt = null, facts = {} } = {}) {
  const parts = [];
  if (one.reasoning) {
    const open = one.openReasoning ?? (!one.done && !one.text); // a reader's own choice holds
    const choose = (event) => (one.openReasoning = !event.currentTarget.parentElement.open);
    parts.push(h("details", { class: "reasoning", open }, h("summary", { onclick: choose }, icon("down"), one.text || one.done ? "Reasoning" : "Reasoning …"), h("div", null, markdown(one.reasoning))));
  }
  if (look === "tokens") {
    if (prompt) parts.push(h("details", { class: "prompt-tokens", open: true }, h("summary", null, icon("down"), h("h3", null, `Prompt, ${plural(prompt.length, "token")}`)), promptView(prompt, facts.cached ?? 0, facts.miss)));
    parts.push(h("h3", null, `Answer, ${plural(one.tokens.length, "token")}`));
    parts.push(one.tokens.length ? tokenView(one.tokens).element : h("p", { class: "muted small" }, "This answer was asked for without probabilities (Settings, Tokens)."));
  } else {
    if (schema && one.text) parts.push(jsonResult(one.text, schema, one.done));
    else if (one.text) parts.push(markdown(one.text));
    parts.push(one.calls.filter(Boolean).map(callCard));
    if (!one.done && !one.text && !one.reasoning && !one.calls.length) parts.push(busy());
    if (one.done && !one.text && !one.calls.length && !one.reasoning && !one.error) parts.push(h("p", { class: "muted small" }, "The answer is empty."));
  }
  return parts;
}

const ENDS = { length: "ended at the limit of tokens", abort: "aborted" };

export function figures(run, one) {
  const facts = run.figures;
  const shown = [
    facts.prompt !== undefined && [`${number(facts.prompt)}`, "prompt"],
    facts.cached !== undefined && [`${number(facts.cached)}`, "cached"],
    facts.completion ? [`${number(facts.completion)}`, "out"] : null,
    facts.forced ? [`${number(facts.forced)}`, "dictated"] : null,
    facts.ttft !== null && facts.ttft !== undefined && [duration(facts.ttft), "to first token"],
    facts.speed ? [`${number(facts.speed)}`, "tokens/s"] : null,
  ].filter(Boolean);
  const end = run.stopped ? "stopped" : ENDS[one?.finish];
  return h("p", { class: "figures num", "data-figures": true }, shown.map(([value, name]) => h("span", null, h("b", null, value), ` ${name}`)), end && h("span", { class: "end" }, end));
}

export function errorOf(run, retry) {
  return run.error ? errorCard(run.error, retry) : null;
}

export function copyButton(text) {
  const own = button("copy", "Copy", () => copyText(text(), own), { kind: "small" });
  return own;
}
