// Tokens as chips: how sure the model was of each, what else it might have said, what a grammar dictated.

import { h, percent, plural } from "./dom.js";

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→").replaceAll(" ", "·");
const bucket = (share) => (share >= 0.9 ? 5 : share >= 0.7 ? 4 : share >= 0.45 ? 3 : share >= 0.2 ? 2 : share >= 0.05 ? 1 : 0);
const LABELS = ["under 5%", "5 to 20%", "20 to 45%", "45 to 70%", "70 to 90%", "over 90%"];

function chip(token, at) {
  const share = Math.exp(token.logprob);
  const kinds = ["token", `p${bucket(share)}`, token.forced && "forced"].filter(Boolean).join(" ");
  const name = `${JSON.stringify(token.text)}, ${percent(share)}${token.forced ? ", dictated" : ""}`;
  return h("button", { type: "button", class: kinds, "data-at": at, tabindex: at ? "-1" : "0", "aria-label": name }, visible(token.text) || "∅");
}

function detail(token, at) {
  const share = Math.exp(token.logprob), top = token.top.length ? token.top : [[token.text, token.logprob]];
  const listed = top.some(([text]) => text === token.text) ? top : [...top, [token.text, token.logprob]];
  const rest = 1 - listed.reduce((sum, [, logprob]) => sum + Math.exp(logprob), 0);
  return h(
    "div", { class: "token-detail" },
    h("p", { class: "token-name" }, h("code", null, visible(token.text) || "(empty)"), h("span", { class: "muted small num" }, `token ${at + 1} · ${percent(share)} · log-probability ${token.logprob.toFixed(3).replace(/^-(0\.0+)$/, "$1")}`)),
    token.forced && h("p", { class: "small" }, h("span", { class: "forced-mark" }), "The grammar left no other token; the model's own wish is below."),
    h(
      "ol", { class: "alternatives", "aria-label": "Most likely tokens here" },
      listed.map(([text, logprob]) => row(visible(text) || "(empty)", Math.exp(logprob), text === token.text)),
      rest > 0.0005 && row("all others", rest, false, true),
    ),
  );
}

function row(name, share, chosen, others = false) {
  const bar = h("span", { class: "bar" });
  bar.style.setProperty("--share", `${Math.max(0.5, Math.min(100, share * 100))}%`);
  return h("li", { class: chosen ? "chosen" : others ? "others" : "" }, h("code", null, name), bar, h("span", { class: "num" }, percent(share)), chosen && h("span", { class: "hidden-text" }, "chosen"));
}

// A view of `tokens` that grows with `update()`.
export function tokenView(tokens) {
  const chips = h("div", { class: "tokens", role: "group", "aria-label": "Tokens of the answer" });
  const shown = h("div", { class: "token-shown", "aria-live": "polite" }, h("p", { class: "muted small" }, "Point at a token, or walk with the arrow keys."));
  let pinned = null, current = 0;
  const show = (at) => {
    chips.querySelector(".on")?.classList.remove("on");
    chips.children[at]?.classList.add("on");
    shown.replaceChildren(detail(tokens[at], at));
  };
  const place = (event) => {
    const found = event.target.closest?.(".token");
    return found ? Number(found.dataset.at) : null;
  };
  const go = (at) => {
    const next = [...chips.querySelectorAll(".token")][at];
    if (!next) return;
    chips.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
    current = at;
  };
  chips.addEventListener("pointerover", (event) => pinned === null && place(event) !== null && show(place(event)));
  chips.addEventListener("focusin", (event) => place(event) !== null && show((current = place(event))));
  chips.addEventListener("click", (event) => {
    const at = place(event);
    if (at === null) return;
    pinned = pinned === at ? null : at;
    show(at);
  });
  chips.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -tokens.length, End: tokens.length }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    go(Math.max(0, Math.min(tokens.length - 1, current + step)));
  });
  const update = () => {
    for (let at = chips.children.length; at < tokens.length; at++) chips.append(chip(tokens[at], at));
  };
  update();
  return { element: h("div", { class: "token-view" }, legend(tokens), chips, shown), update };
}

function legend(tokens) {
  const scale = h("span", { class: "scale", role: "img", "aria-label": "Colors, from unlikely to likely" }, LABELS.map((label, at) => h("i", { class: `p${at}`, title: label })));
  return h("p", { class: "legend" }, h("span", null, "unlikely"), scale, h("span", null, "likely"), tokens.some((token) => token.forced) && h("span", null, h("span", { class: "forced-mark" }), "dictated by the grammar"));
}

// The prompt, as [id, text] pairs, of which the first `cached` were taken from the cache. `miss`: why no more.
export function promptView(pairs, cached, miss) {
  return h(
    "div", { class: "token-view" },
    h("p", { class: "legend" }, h("span", null, h("i", { class: "swatch cached" }), `${plural(cached, "token")} from the cache`), h("span", null, h("i", { class: "swatch computed" }), `${plural(pairs.length - cached, "token")} computed`)),
    miss && h("p", { class: "small muted miss" }, miss.explanation.charAt(0).toUpperCase() + miss.explanation.slice(1)),
    h("div", { class: "tokens prompt", tabindex: "0", role: "group", "aria-label": "Tokens of the prompt" }, pairs.map(([id, text], at) => h("span", { class: `token ${at < cached ? "cached" : "computed"}${miss?.reason === "other_tokens" && at === miss.position ? " parted" : ""}`, title: `token ${at + 1}, id ${id}, ${at < cached ? "cached" : "computed"}` }, visible(text) || "∅"))),
  );
}
