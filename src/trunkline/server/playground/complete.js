// A text, and how the model goes on with it: no chat template, POST /generate.

import { answerBody, copyButton, errorOf, figures } from "./answer.js";
import { announce, button, copyText, eachFrame, grow, h, keepingFocus } from "./dom.js";
import { inForce } from "./force.js";
import { generate, promptTokens } from "./generation.js";
import { settingsForm } from "./panel.js";
import { clean, load, save, schemaOf, slim, toLink } from "./settings.js";

export function completeView(about, shared) {
  const settings = shared ? clean(shared.settings) : load("complete", {});
  let running = null, look = "text", last = null, prompt = null, force = null;
  const input = h("textarea", { rows: 6, class: "document", "aria-label": "Text to go on with", placeholder: "Begin a text; the model goes on with it", value: String(shared?.prompt ?? "") });
  const output = h("div", { class: "outputs", "aria-live": "off" });
  const go = h("button", { type: "button", class: "button main" });

  function show() {
    if (!last) return output.replaceChildren(h("p", { class: "muted empty-line" }, "The continuation appears here, token by token."));
    const { run, schema } = last;
    const shown = run.answers.length ? run.answers : [{ text: "", reasoning: "", calls: [], tokens: [], done: !running, error: run.error }];
    const blocks = shown.map((one, at) =>
      h(
        "article", { class: "output", "aria-label": shown.length > 1 ? `Continuation ${at + 1}` : "Continuation" },
        look === "text" && !schema
          ? h("div", { class: "continuation" }, shown.length === 1 && h("span", { class: "given" }, last.text), one.text || (!one.done ? "" : "∅"), !one.done && h("span", { class: "caret" }))
          : h("div", { class: "body" }, answerBody(one, { look, schema, prompt: at ? null : prompt, facts: run.figures })),
        at === 0 && force,
        one.done && h("div", { class: "actions" }, at === 0 && button("sliders", "What was in force", showForce, { kind: "small", "aria-pressed": String(Boolean(force)) }), copyButton(() => one.text)),
      ),
    );
    output.replaceChildren(...blocks, errorOf(run, () => start()) ?? "", run.answers.length ? figures(run, run.answers[0]) : "");
  }

  async function showForce() {
    force = force ? null : await inForce(last.run.figures.id).catch((error) => errorOf({ error }));
    keepingFocus(output, show);
  }

  async function start() {
    if (running) return running.abort();
    const text = input.value, controller = (running = new AbortController());
    prompt = force = null;
    state();
    try {
      const schema = schemaOf(settings);
      const draw = eachFrame(show);
      await generate(structuredClone(settings), text, { signal: controller.signal, onnews: (run) => ((last = { run, schema, text }), draw()) });
    } catch (error) {
      last = { run: { answers: [], figures: {}, error }, schema: null, text };
    }
    running = null;
    state();
    show();
    announce(last.run.error ? `Error: ${last.run.error.message}` : `Continuation: ${last.run.answers[0]?.text.slice(0, 400) ?? ""}`);
    if (look === "tokens") loadPrompt();
  }

  async function loadPrompt() {
    if (prompt || !last) return;
    prompt = await promptTokens(settings, last.text).catch(() => null);
    show();
  }

  const looks = h("div", { class: "tabs", role: "group", "aria-label": "Show" }, [["text", "Text"], ["tokens", "Tokens"]].map(([name, label]) => h("button", { type: "button", "aria-pressed": String(name === look), "data-look": name, onclick: () => choose(name) }, label)));
  function choose(name) {
    look = name;
    for (const one of looks.children) one.setAttribute("aria-pressed", String(one.dataset.look === name));
    show();
    if (name === "tokens") loadPrompt();
  }
  function state() {
    go.replaceChildren(running ? "Stop" : "Go on");
    go.disabled = !running && !input.value;
  }
  go.addEventListener("click", start);
  input.addEventListener("input", state);
  input.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && (event.preventDefault(), running || start()));
  state();
  show();
  const share = button("link", "Copy a link to this text and these settings", () => copyText(toLink("complete", { prompt: input.value, settings: slim(settings) }), share), { kind: "small" });
  const body = h("div", { class: "column" }, grow(input, 420), h("div", { class: "row bar-row" }, looks, h("span", { class: "wide" }), h("span", { class: "muted small keys" }, "Ctrl + Enter"), go), output);
  return {
    element: h("section", { class: "pane", "aria-label": "Complete" }, h("div", { class: "scroller" }, body)),
    title: "Complete",
    panel: () => settingsForm(settings, () => save("complete", settings), { about, raw: true }),
    tools: [share],
    shown: () => matchMedia("(hover: hover)").matches && input.focus({ preventScroll: true }),
    escape: () => running?.abort(),
  };
}
