// One prompt, two sets of settings, side by side.

import { answerBody, errorOf, figures } from "./answer.js";
import { announce, button, copyText, eachFrame, grow, h, icon, number } from "./dom.js";
import { compareTexts, firstDifference } from "./diff.js";
import { generate } from "./generation.js";
import { settingsForm } from "./panel.js";
import { clean, load, PARAMETERS, save, schemaOf, slim, toLink } from "./settings.js";

const SIDES = ["A", "B"];

export function compareView(about, shared) {
  const start = shared ? [clean(shared.a), clean(shared.b)] : [load("compare.a", {}), load("compare.b", { params: { temperature: 1 } })];
  const system = { text: String(shared?.system ?? "") };
  let running = null;
  const prompt = h("textarea", { rows: 2, "aria-label": "Prompt of both", placeholder: "One prompt for both sides", value: String(shared?.prompt ?? "") });
  const go = h("button", { type: "button", class: "button main" });
  const verdict = h("p", { class: "verdict-line", role: "status" });
  const sides = SIDES.map((name, at) => side(name, start[at], () => (save(`compare.${name.toLowerCase()}`, start[at]), difference())));

  function side(name, settings, onchange) {
    const output = h("div", { class: "body compare-out", "aria-live": "off" }, h("p", { class: "muted small" }, "No answer yet"));
    const facts = h("div");
    const chips = h("p", { class: "chips" });
    const form = settingsForm(settings, onchange, { about, open: ["Sampling"] });
    const element = h("section", { class: "side", "aria-label": `Side ${name}` }, h("div", { class: "side-top" }, h("h2", null, h("span", { class: "letter" }, name)), chips), h("details", { class: "side-settings" }, h("summary", null, icon("down"), "Settings"), form), output, facts);
    return { name, settings, output, facts, chips, element, run: null, schema: null };
  }

  // Which settings differ, on both sides.
  function difference() {
    const names = Object.keys(PARAMETERS).filter((name) => sides[0].settings.params[name] !== sides[1].settings.params[name]);
    const others = ["system", "stop", "thinking", "schemaOn", "schema", "toolsOn", "tools", "toolChoice"].filter((name) => JSON.stringify(sides[0].settings[name]) !== JSON.stringify(sides[1].settings[name]));
    for (const one of sides) {
      const shown = names.map((name) => `${PARAMETERS[name][0]} ${one.settings.params[name] ?? "default"}`);
      const told = others.map((name) => ({ system: one.settings.system ? "own system prompt" : "no system prompt", schemaOn: one.settings.schemaOn ? "JSON schema" : "free text", toolsOn: one.settings.toolsOn ? "tools" : "no tools", stop: `${one.settings.stop.length} stop texts`, thinking: `reasoning ${one.settings.thinking}` })[name]).filter(Boolean);
      one.chips.replaceChildren(...[...shown, ...told].map((text) => h("span", { class: "chip num" }, text)));
      if (!names.length && !others.length) one.chips.append(h("span", { class: "muted small" }, "same settings"));
    }
  }

  function draw(one) {
    const { run } = one;
    if (!run) return;
    const answers = run.answers.length ? run.answers : [{ text: "", reasoning: "", calls: [], tokens: [], done: !running || Boolean(run.error), error: run.error }];
    one.output.replaceChildren(...answers.flatMap((answer) => answerBody(answer, { schema: one.schema })).flat(3).filter(Boolean), errorOf(run) ?? "");
    one.facts.replaceChildren(run.answers.length ? figures(run, run.answers[0]) : "");
  }

  function marks() {
    const [left, right] = sides.map((one) => one.run?.answers[0]?.text ?? "");
    if (sides.some((one) => !one.run || one.run.error || !one.run.answers.length)) return;
    const at = firstDifference(left, right);
    const same = sides.every((one) => !one.run.stopped) && at < 0;
    verdict.textContent = at < 0 ? "Both answers are equal, to the last character." : `The answers part at character ${number(at + 1)}.`;
    verdict.classList.toggle("same", same);
    if (at < 0) return;
    compareTexts(left, right).forEach((parts, i) => {
      if (sides[i].schema || sides[i].run.answers.length > 1) return;
      const marked = h("div", { class: "plain" }, parts.map(([text, only]) => (only ? h("mark", null, text) : text)));
      const place = sides[i].output.querySelector(".md");
      place?.replaceWith(marked);
    });
  }

  async function runBoth() {
    if (running) return running.abort();
    const controller = (running = new AbortController());
    state();
    verdict.textContent = "";
    const messages = [{ role: "user", content: prompt.value }];
    await Promise.all(
      sides.map(async (one) => {
        const update = eachFrame(() => (draw(one), running || marks()));
        try {
          one.schema = schemaOf(one.settings);
          const settings = { ...structuredClone(one.settings), system: one.settings.system || system.text };
          one.run = await generate(settings, messages, { signal: controller.signal, onnews: (run) => ((one.run = run), update()) });
        } catch (error) {
          one.run = { answers: [], figures: {}, error };
        }
      }),
    );
    running = null;
    state();
    sides.forEach(draw);
    marks();
    announce(verdict.textContent || "Both have ended");
  }

  function state() {
    go.replaceChildren(running ? "Stop both" : "Run both");
    go.disabled = !running && !prompt.value.trim();
  }
  go.addEventListener("click", runBoth);
  prompt.addEventListener("input", state);
  prompt.addEventListener("keydown", (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && (event.preventDefault(), running || go.disabled || runBoth()));
  state();
  difference();
  const link = () => toLink("compare", { prompt: prompt.value, system: system.text, a: slim(sides[0].settings), b: slim(sides[1].settings) });
  const share = button("link", "Copy a link to this comparison", () => copyText(link(), share), { kind: "small" });
  return {
    element: h("section", { class: "pane", "aria-label": "Compare" }, h("div", { class: "scroller" }, h("div", { class: "column broad" }, h("div", { class: "compare-top" }, grow(prompt, 240), h("div", { class: "row" }, go)), verdict, h("div", { class: "sides" }, sides.map((one) => one.element))))),
    title: "Compare",
    panel: null,
    tools: [share],
    shown: () => matchMedia("(hover: hover)").matches && prompt.focus({ preventScroll: true }),
    escape: () => running?.abort(),
  };
}
