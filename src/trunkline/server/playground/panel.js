// The form of a settings object. Each field shows the server's default until it is changed.

import { button, grow, h, icon } from "./dom.js";
import { bounds, GROUPS, PARAMETERS, SEED } from "./settings.js";

const SCHEMA = `{
  "type": "object",
  "properties": {
    "name": {"type": "string"},
    "age": {"type": "integer"}
  },
  "required": ["name", "age"],
  "additionalProperties": false
}`;
const TOOLS = `[
  {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
      "type": "object",
      "properties": {"city": {"type": "string"}},
      "required": ["city"]
    }
  }
]`;

let ids = 0;

export function settingsForm(settings, onchange, { about, raw = false, open = ["Sampling"] } = {}) {
  const changed = () => onchange(settings);
  return h(
    "div", { class: "settings" },
    !raw && systemField(settings, changed),
    GROUPS.map(([title, names]) => group(title, open.includes(title), names.map((name) => parameter(settings, name, changed, raw)), () => names.filter((name) => name in settings.params).length)),
    group("Stop and reasoning", false, [stopField(settings, changed), !raw && about.thinking && thinkingField(settings, changed)], () => settings.stop.length + (settings.thinking !== "default")),
    about.grammar && jsonBox(settings, changed, { on: "schemaOn", text: "schema", title: "JSON schema", name: "Schema that the answer must fit", example: SCHEMA, note: "Every token is chosen so that the whole answer fits." }),
    !raw && about.tools && jsonBox(settings, changed, { on: "toolsOn", text: "tools", title: "Tools", name: "Tools that the model may call", example: TOOLS, note: "A JSON list of functions.", more: choiceField(settings, changed) }),
    group("Tokens", false, tokenFields(settings, changed), () => 0),
  );
}

function group(title, open, content, count) {
  const mark = h("span", { class: "changed num" });
  const tell = () => {
    const changes = count();
    mark.textContent = changes ? `${changes} changed` : "";
  };
  tell();
  const all = h("details", { class: "group", open }, h("summary", null, h("h2", null, title), mark, icon("down")), h("div", { class: "group-body" }, content));
  all.addEventListener("input", () => queueMicrotask(tell));
  all.addEventListener("click", () => queueMicrotask(tell));
  return all;
}

function field(label, control, { help, top = null } = {}) {
  const id = `field-${++ids}`;
  control.id = id;
  if (help) control.setAttribute("aria-describedby", `${id}-help`);
  return h("div", { class: "field" }, h("div", { class: "field-top" }, h("label", { for: id }, label), top), control, help && h("p", { class: "help", id: `${id}-help` }, help));
}

function systemField(settings, changed) {
  const area = h("textarea", { rows: 2, value: settings.system, placeholder: "None", oninput: () => ((settings.system = area.value), changed()) });
  return h("div", { class: "group group-body first" }, field("System prompt", grow(area, 240)));
}

function parameter(settings, name, changed, raw) {
  const [label, , help, step, range] = PARAMETERS[name], { low, high, ...defaults } = bounds(name), standard = raw ? defaults.raw : defaults.default;
  const shown = standard === null ? { max_new_tokens: "to the end", sampling_seed: "random" }[name] : `${standard}`;
  const box = h("input", { type: "number", class: "num", step: range ? "any" : 1, min: low ?? undefined, max: high ?? undefined, placeholder: shown, value: settings.params[name] ?? "" });
  const slider = range && h("input", { type: "range", min: range[0], max: range[1], step, "aria-label": `${label}, slider`, tabindex: "-1" });
  const reset = button("close", `Back to the default of ${label}`, () => set(""), { kind: "tiny" });
  const mark = () => {
    const own = name in settings.params;
    reset.hidden = !own;
    box.parentElement?.classList.toggle("own", own);
    if (slider && document.activeElement !== slider) slider.value = settings.params[name] ?? standard ?? range[0];
  };
  const set = (text, from) => {
    const value = Number(text);
    if (text === "" || !Number.isFinite(value)) delete settings.params[name];
    else if (name === "sampling_seed" && SEED.test(text) && !Number.isSafeInteger(value)) settings.params[name] = text;
    else settings.params[name] = range ? Number(value.toFixed(4)) : Math.round(value);
    if (from !== box) box.value = settings.params[name] ?? "";
    box.setCustomValidity("");
    mark();
    changed();
  };
  box.addEventListener("input", () => set(box.value, box));
  slider?.addEventListener("input", () => set(slider.value, slider));
  const control = h("div", { class: "parameter" }, h("div", { class: "field-top" }, h("label", { for: `p-${++ids}` }, label), reset, box), slider, h("p", { class: "help", id: `h-${ids}` }, help));
  box.id = `p-${ids}`;
  box.setAttribute("aria-describedby", `h-${ids}`);
  mark();
  return control;
}

const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
const unescaped = (text) => text.replace(/\\([nt\\])/g, (_, char) => ({ n: "\n", t: "\t", "\\": "\\" })[char]);

function stopField(settings, changed) {
  const area = h("textarea", { class: "code", rows: 2, value: settings.stop.map(escaped).join("\n"), placeholder: "None" });
  area.addEventListener("input", () => {
    settings.stop = area.value.split("\n").filter(Boolean).map(unescaped);
    changed();
  });
  return field("Stop texts", grow(area), { help: "One in each line; \\n is a new line. The answer ends before the first." });
}

function choice(label, options, value, onchange, help) {
  const select = h("select", { onchange: () => onchange(select.value) }, options.map(([name, text]) => h("option", { value: name, selected: name === value }, text)));
  return field(label, select, { help });
}

function thinkingField(settings, changed) {
  return choice("Reasoning", [["default", "As the model does by itself"], ["on", "On"], ["off", "Off"]], settings.thinking, (value) => ((settings.thinking = value), changed()));
}

function choiceField(settings, changed) {
  return choice("Calls", [["auto", "As the model decides"], ["required", "At least one"], ["none", "None"]], settings.toolChoice, (value) => ((settings.toolChoice = value), changed()));
}

function jsonBox(settings, changed, { on, text, title, name, example, note, more }) {
  const wrong = h("p", { class: "help wrong", role: "status" });
  const area = h("textarea", { class: "code", rows: 4, spellcheck: "false", "aria-label": name, value: settings[text], placeholder: "JSON" });
  const check = () => {
    let problem = "";
    if (settings[on] && area.value.trim()) {
      try {
        JSON.parse(area.value);
      } catch (error) {
        problem = `Not valid JSON: ${error.message}`;
      }
    }
    wrong.textContent = problem;
    area.setAttribute("aria-invalid", problem ? "true" : "false");
  };
  const use = () => {
    settings[on] = toggle.checked;
    body.hidden = !toggle.checked;
    if (toggle.checked && !area.value.trim()) settings[text] = area.value = example;
    check();
    changed();
    area.dispatchEvent(new Event("input"));
  };
  const toggle = h("input", { type: "checkbox", checked: settings[on], onchange: () => use(), id: `t-${++ids}` });
  area.addEventListener("input", () => {
    settings[text] = area.value;
    check();
    changed();
  });
  const body = h("div", { class: "group-body", hidden: !settings[on] }, grow(area, 360), wrong, h("p", { class: "help" }, note), more);
  check();
  return h("div", { class: "group json-box" }, h("div", { class: "switch" }, h("label", { for: toggle.id }, h("h2", null, title)), toggle), body);
}

function tokenFields(settings, changed) {
  const toggle = h("input", { type: "checkbox", checked: settings.tokens });
  const top = h("input", { type: "number", class: "num", min: 1, max: 20, value: settings.top });
  toggle.addEventListener("change", () => ((settings.tokens = toggle.checked), changed()));
  top.addEventListener("input", () => {
    settings.top = Math.min(20, Math.max(1, Math.round(Number(top.value)) || 5));
    changed();
  });
  return [
    h("label", { class: "switch plain" }, h("span", null, "Ask for probabilities"), toggle),
    h("div", { class: "parameter" }, h("div", { class: "field-top" }, h("label", { for: `p-${++ids}` }, "Alternatives"), Object.assign(top, { id: `p-${ids}` })), h("p", { class: "help" }, "Likely tokens kept for each place, 1 to 20")),
  ];
}
