// A conversation with the model: branches, tools, JSON, tokens.

import { answerBody, copyButton, errorOf, figures } from "./answer.js";
import { ApiError } from "./api.js";
import { Conversation } from "./conversation.js";
import { announce, button, copyText, eachFrame, grow, h, icon, keepingFocus, s } from "./dom.js";
import { inForce } from "./force.js";
import { generate, promptTokens } from "./generation.js";
import { settingsForm } from "./panel.js";
import { clean, load, save, schemaOf, slim, toLink } from "./settings.js";

const EXAMPLES = ["What is 17 + 15?", "Sort these numbers from small to large: 42, 7, 19", "Spell the word river backwards."];

export function chatView(about, shared) {
  const settings = shared ? clean(shared.settings) : load("chat", {});
  const conversation = Conversation.restore();
  const views = new Map(); // node id -> how its message is shown
  const list = h("div", { class: "messages", role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const scroller = h("div", { class: "scroller" }, list);
  let running = null; // the AbortController of what runs

  // ------------------------------------------------------------------ running
  async function run(parent) {
    running?.abort();
    const controller = (running = new AbortController());
    const nodes = [];
    let schema = null;
    const show = eachFrame(() => nodes.forEach((node) => views.get(node.id)?.update()));
    const input = conversation.messages(parent);
    const first = conversation.add(parent, { role: "assistant", answer: { text: "", reasoning: "", calls: [], tokens: [], done: false } });
    nodes.push(first);
    first.running = true;
    const asked = structuredClone(settings);
    const onnews = (news) => {
      news.answers.forEach((answer, at) => {
        if (!nodes[at]) {
          nodes[at] = conversation.add(parent, { role: "assistant", running: true });
          const above = conversation.nodes.get(parent);
          above.active = above.children.indexOf(first.id);
        }
        Object.assign(nodes[at], { answer, schema, asked, run: { figures: news.figures, stopped: news.stopped } });
      });
      show();
    };
    render();
    toBottom(true);
    sendState();
    let result;
    try {
      schema = schemaOf(settings);
      result = await generate(asked, input, { signal: controller.signal, onnews });
    } catch (error) {
      result = { error, stopped: false, answers: [], figures: {} };
    }
    for (const node of nodes) {
      node.running = false;
      node.answer.done = true;
      const { error } = result;
      const kept = error && { name: error.name, message: error.message, code: error.code, param: error.param, pointer: error.pointer, status: error.status };
      node.run = { figures: result.figures, stopped: result.stopped, error: kept };
      node.failed = Boolean(error) && !node.answer.text;
      node.input = parent;
    }
    if (running === controller) running = null;
    conversation.save();
    render();
    sendState();
    const text = nodes[0].answer.text;
    announce(result.error ? `Error: ${result.error.message}` : result.stopped ? "Stopped" : `Answer: ${text.slice(0, 400) || "a tool call"}`);
  }

  // ------------------------------------------------------------------ messages
  function render() {
    const path = conversation.path();
    for (const id of views.keys()) if (!path.some((node) => node.id === id)) views.delete(id);
    const elements = path.map((node) => {
      let view = views.get(node.id);
      if (!view) views.set(node.id, (view = message(node)));
      view.update();
      return view.element;
    });
    list.replaceChildren(...(elements.length ? elements : [empty()]));
    list.classList.toggle("is-empty", !elements.length);
  }

  function message(node) {
    const element = h("article", { class: `message ${node.role}`, "aria-label": node.role === "user" ? "You" : node.role === "tool" ? "Tool result" : "Answer" });
    const view = { element, look: "text", editing: false, update: () => keepingFocus(element, () => draw(node, view)) };
    return view;
  }

  function draw(node, view) {
    const follow = atBottom();
    if (view.editing) return;
    if (node.role === "assistant") view.element.replaceChildren(...assistant(node, view).flat(3).filter(Boolean));
    else view.element.replaceChildren(h("div", { class: "bubble" }, node.role === "tool" && h("p", { class: "call-name" }, icon("branch"), h("span", { class: "muted small" }, `result of ${node.tool}`)), h("div", { class: "plain" }, node.content)), actions(node, view));
    if (follow) toBottom();
  }

  function assistant(node, view) {
    const run = { figures: {}, ...node.run }, one = Object.assign(node.answer, { error: run.error });
    const retry = () => {
      conversation.remove(node);
      regenerate(node.parent);
    };
    const parts = [h("div", { class: "body" }, answerBody(one, { look: view.look, schema: node.schema, prompt: view.prompt, facts: run.figures }), view.problem && errorOf({ error: view.problem }))];
    if (view.force) parts.push(view.force);
    if (run.error) parts.push(errorOf({ error: Object.assign(new ApiError(run.error.status ?? 0, run.error), { name: run.error.name }) }, retry));
    if (!node.running && one.calls.length && !node.children.length) parts.push(resultsForm(node));
    if (!node.running || run.figures.completion) parts.push(figures(run, one));
    if (!node.running) parts.push(actions(node, view));
    return parts;
  }

  function actions(node, view) {
    const { at, count } = conversation.siblings(node);
    const step = (by) => {
      conversation.show(node, by);
      render();
      conversation.save();
    };
    const own = node.role === "assistant";
    const tokens = own && button("tokens", view.look === "tokens" ? "Show the text" : "Show the tokens", () => showTokens(node, view), { kind: "small", "aria-pressed": String(view.look === "tokens") });
    return h(
      "div", { class: "actions" },
      count > 1 && h("span", { class: "branches num" }, button("left", "The branch before", () => step(-1), { kind: "small", disabled: at === 0 }), h("span", { "aria-label": `Branch ${at + 1} of ${count}` }, `${at + 1}/${count}`), button("right", "The next branch", () => step(1), { kind: "small", disabled: at === count - 1 })),
      tokens,
      own && node.run?.figures?.id && button("sliders", "What was in force", () => showForce(node, view), { kind: "small", "aria-pressed": String(Boolean(view.force)) }),
      own && button("again", "Another answer", () => regenerate(node.parent), { kind: "small" }),
      node.role !== "tool" && button("edit", own ? "Edit, as a new branch" : "Edit and ask again", () => edit(node, view), { kind: "small" }),
      copyButton(() => (own ? node.answer.text : node.content)),
      button("trash", "Delete from here", () => drop(node), { kind: "small" }),
    );
  }

  async function showTokens(node, view) {
    view.look = view.look === "tokens" ? "text" : "tokens";
    view.update();
    if (view.look === "tokens" && !view.prompt) {
      try {
        view.prompt = await promptTokens(node.asked ?? settings, conversation.messages(node.parent));
        view.problem = null;
      } catch (error) {
        view.problem = error;
      }
      view.update();
    }
  }

  async function showForce(node, view) {
    view.force = view.force ? null : await inForce(node.run.figures.id).catch((error) => errorOf({ error }));
    view.update();
  }

  function regenerate(parent) {
    run(parent);
  }

  function drop(node) {
    running?.abort();
    conversation.remove(node);
    conversation.save();
    render();
    announce("Deleted");
    input.focus();
  }

  function edit(node, view) {
    const own = node.role === "assistant";
    const area = h("textarea", { value: own ? node.answer.text : node.content, "aria-label": "Edit the message", rows: 2 });
    const end = () => {
      view.editing = false;
      view.update();
      view.element.querySelector(".actions button")?.focus();
    };
    const accept = () => {
      view.editing = false;
      if (own) {
        conversation.add(node.parent, { role: "assistant", answer: { text: area.value, reasoning: "", calls: [], tokens: [], done: true }, run: { figures: {} } });
        conversation.save();
        render();
        input.focus();
      } else run(conversation.add(node.parent, { role: node.role, content: area.value }).id);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") end();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) accept();
    });
    view.editing = true;
    view.element.replaceChildren(h("div", { class: "editing" }, grow(area, 400), h("div", { class: "row end" }, button(null, "Cancel", end, { text: true, kind: "small" }), button(null, own ? "Keep as a branch" : "Ask", accept, { text: true, kind: "small main" }))));
    area.focus();
  }

  function resultsForm(node) {
    const calls = node.answer.calls.filter(Boolean);
    const areas = calls.map((call) => h("textarea", { class: "code", rows: 1, "aria-label": `Result of ${call.name}`, placeholder: `Result of ${call.name}` }));
    const submit = () => {
      let parent = node.id;
      calls.forEach((call, at) => (parent = conversation.add(parent, { role: "tool", content: areas[at].value, callId: call.id, tool: call.name }).id));
      run(parent);
    };
    const ready = () => (sendButton.disabled = !areas.every((area) => area.value.trim()));
    areas.forEach((area) => {
      area.addEventListener("input", ready);
      area.addEventListener("keydown", (event) => event.key === "Enter" && !event.shiftKey && (event.preventDefault(), sendButton.disabled || submit()));
    });
    const sendButton = button("send", areas.length > 1 ? "Send the results" : "Send the result", submit, { text: true, kind: "small", disabled: true });
    return h("div", { class: "results" }, areas, h("div", { class: "row end" }, sendButton));
  }

  function empty() {
    const ask = (text) => {
      input.value = text;
      submit();
    };
    return h(
      "div", { class: "empty" },
      s("svg", { viewBox: "0 0 120 48", class: "motif", "aria-hidden": "true" }, s("path", { d: "M4 24h34c22 0 18-18 40-18h38M38 24h78M38 24c22 0 18 18 40 18h38" }), [[4, 24], [116, 6], [116, 24], [116, 42]].map(([cx, cy]) => s("circle", { cx, cy, r: 3 }))),
      h("h1", null, `Talk with ${about.model}`),
      h("p", { class: "muted" }, about.chat ? "Everything stays between this browser and your server." : "This model has no chat template: use Complete instead."),
      about.chat && h("div", { class: "examples" }, EXAMPLES.map((text) => h("button", { type: "button", class: "example", onclick: () => ask(text) }, text))),
    );
  }

  // ------------------------------------------------------------------ writing
  const input = h("textarea", { id: "message", rows: 1, placeholder: "Write a message", "aria-label": "Message" });
  const sender = h("button", { type: "button", class: "button main round" });
  const submit = () => {
    const text = input.value.trim();
    if (!text || running) return;
    input.value = "";
    input.dispatchEvent(new Event("input"));
    run(conversation.add(conversation.tail, { role: "user", content: text }).id);
  };
  function sendState() {
    const stops = running !== null;
    sender.replaceChildren(icon(stops ? "stop" : "send"));
    sender.setAttribute("aria-label", stops ? "Stop" : "Send");
    sender.title = stops ? "Stop (Esc)" : "Send (Enter)";
    sender.disabled = !stops && !input.value.trim();
  }
  sender.addEventListener("click", () => (running ? running.abort() : submit()));
  input.addEventListener("input", sendState);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  const composer = h("div", { class: "composer" }, h("div", { class: "composer-box" }, grow(input, 220), sender), h("p", { class: "hint muted" }, "Enter sends, Shift + Enter starts a new line, Esc stops"));

  const atBottom = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  const toBottom = () => (scroller.scrollTop = scroller.scrollHeight);

  const clear = () => {
    running?.abort();
    for (const node of conversation.path().slice(0, 1)) conversation.remove(node);
    conversation.nodes.get(0).children.slice().forEach((id) => conversation.remove(conversation.nodes.get(id)));
    conversation.save();
    render();
    input.focus();
  };
  const share = button("link", "Copy a link to these settings", () => copyText(toLink("chat", { settings: slim(settings) }), share), { kind: "small" });
  const element = h("section", { class: "pane", "aria-label": "Chat" }, scroller, composer);
  if (shared) save("chat", settings);
  render();
  sendState();
  return {
    element,
    title: "Chat",
    panel: () => settingsForm(settings, () => save("chat", settings), { about }),
    tools: [button("plus", "New conversation", clear, { kind: "small" }), share],
    shown: () => {
      toBottom();
      if (matchMedia("(hover: hover)").matches) input.focus({ preventScroll: true });
    },
    escape: () => running?.abort(),
  };
}
