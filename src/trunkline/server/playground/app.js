// The page: views, the key, the theme, and what the server is.

import { ApiError, errorCard, key, onState, watchServer } from "./api.js";
import { chatView } from "./chat.js";
import { compareView } from "./compare.js";
import { completeView } from "./complete.js";
import { button, h, icon } from "./dom.js";
import { liveView } from "./live.js";
import { fromLink, loadAbout } from "./settings.js";

const VIEWS = { chat: ["Chat", chatView], complete: ["Complete", completeView], compare: ["Compare", compareView], live: ["Live", liveView] };
const THEMES = ["auto", "light", "dark"];
const main = document.getElementById("view");
const made = new Map();
let about = null, current = null;

// ---------------------------------------------------------------------- theme
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => (THEMES.includes(localStorage.getItem("trunkline.theme")) ? localStorage.getItem("trunkline.theme") : "auto");
function applyTheme() {
  document.documentElement.dataset.theme = theme() === "auto" ? (dark.matches ? "dark" : "light") : theme();
  themeButton.replaceChildren(icon({ auto: "half", light: "sun", dark: "moon" }[theme()]));
  themeButton.setAttribute("aria-label", `Theme: ${theme()}`);
  themeButton.title = `Theme: ${theme()}`;
}
const themeButton = button("half", "Theme", () => {
  localStorage.setItem("trunkline.theme", THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
  applyTheme();
});
dark.addEventListener("change", applyTheme);

// ---------------------------------------------------------------------- the key
const keyButton = button("key", "API key", () => openKey(), { "aria-haspopup": "dialog" });
const keyInput = h("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", "aria-describedby": "key-note" });
const keyNote = h("p", { class: "help", id: "key-note" }, "Kept in this tab only, and forgotten when it closes.");
const keyProblem = h("div");
const keyBox = h(
  "dialog", { "aria-labelledby": "key-title" },
  h("form", { method: "dialog", onsubmit: (event) => (event.preventDefault(), useKey(keyInput.value.trim())) }, h("h2", { id: "key-title" }, "API key"), h("div", { class: "field" }, h("label", { for: "key" }, "Key of this server"), keyInput, keyNote), keyProblem, h("div", { class: "row end" }, button(null, "Forget it", () => ((keyInput.value = ""), useKey("")), { text: true }), h("button", { class: "button main" }, "Use it"))),
);
function openKey() {
  keyInput.value = key.get();
  keyProblem.replaceChildren();
  if (!keyBox.open) keyBox.showModal();
  keyInput.select();
}
async function useKey(value) {
  key.set(value);
  try {
    await start();
    keyBox.close();
  } catch (error) {
    keyProblem.replaceChildren(errorCard(error));
  }
}

// ---------------------------------------------------------------------- settings beside the view
const panelBody = h("div", { class: "panel-body" });
const panelButton = button("sliders", "Settings", () => togglePanel(), { kind: "small", "aria-expanded": "false" });
const panel = h("dialog", { class: "panel", "aria-label": "Settings" }, h("div", { class: "panel-top" }, h("h2", null, "Settings"), button("close", "Close the settings", () => togglePanel(false), { kind: "small panel-close" })), panelBody);
const wide = matchMedia("(min-width: 1080px)");
function togglePanel(open = !panel.open) {
  if (panel.open) panel.close();
  if (open && current?.panel) {
    panelBody.replaceChildren(current.panel());
    if (wide.matches) {
      panel.removeAttribute("aria-modal");
      panel.setAttribute("open", "");
    } else panel.showModal();
  }
  panelState();
}
function panelState() {
  panelButton.setAttribute("aria-expanded", String(panel.open));
  main.classList.toggle("with-panel", panel.open && wide.matches);
  if (wide.matches && current?.panel) localStorage.setItem("trunkline.panel", panel.open ? "open" : "closed");
}
panel.addEventListener("close", panelState);
panel.addEventListener("click", (event) => event.target === panel && togglePanel(false));
wide.addEventListener("change", () => togglePanel(wide.matches && Boolean(current?.panel)));

// ---------------------------------------------------------------------- views
const nav = document.getElementById("nav");
nav.append(...Object.entries(VIEWS).map(([name, [label]]) => h("a", { href: `#${name}`, "data-view": name }, label)));

function show() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const view = name in VIEWS ? name : "chat";
  for (const link of nav.children) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[view][0]} · Trunkline`;
  if (!about) return;
  const shared = rest.length ? fromLink(rest.join("/")) : null;
  if (shared) {
    made.delete(view);
    history.replaceState(null, "", `#${view}`);
  }
  if (!made.has(view)) made.set(view, VIEWS[view][1](about, shared));
  if (current !== made.get(view)) current?.hidden?.();
  current = made.get(view);
  const tools = h("div", { class: "view-tools" }, h("h1", null, current.title), current.tools, current.panel && panelButton);
  main.replaceChildren(h("div", { class: "stage" }, tools, current.element), panel);
  panelButton.hidden = !current.panel;
  togglePanel(Boolean(current.panel) && wide.matches && localStorage.getItem("trunkline.panel") !== "closed");
  current.shown?.();
}

function lost(error) {
  const retry = () => start().catch(() => {});
  main.replaceChildren(h("div", { class: "lost" }, errorCard(error, error.status === 401 ? null : retry), error.status === 401 && button("key", "Enter the key", openKey, { text: true, kind: "main" })));
}

async function start() {
  try {
    about = await loadAbout();
  } catch (error) {
    if (!about || error.status === 401) lost(error);
    throw error;
  }
  modelName.textContent = about.model;
  made.clear();
  show();
}

// ---------------------------------------------------------------------- what the server is
const light = h("span", { class: "light", role: "img" });
const modelName = h("b", null, "");
const banner = h("div", { class: "banner", role: "status", hidden: true });
const STATES = { up: "Connected", down: "The server can't be reached", dead: "The engine restarts", key: "A key is needed", checking: "Connecting" };
let wasAway = false;
onState((state) => {
  light.className = `light ${state}`;
  light.setAttribute("aria-label", STATES[state]);
  light.title = STATES[state];
  const away = state === "down" || state === "dead";
  banner.hidden = !away;
  banner.textContent = away ? `${STATES[state]}. Trying again …` : "";
  if (wasAway && state === "up" && !about) start().catch(() => {});
  wasAway = away;
});

document.getElementById("top-end").append(h("div", { class: "model" }, light, modelName), keyButton, themeButton);
document.body.append(keyBox, banner);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !keyBox.open && !event.defaultPrevented) current?.escape?.();
});
document.querySelector(".skip").addEventListener("click", (event) => (event.preventDefault(), main.focus()));
window.addEventListener("hashchange", show);
document.addEventListener("visibilitychange", () => current?.visible?.(!document.hidden));
applyTheme();
show();
watchServer();
start().catch((error) => {
  if (error.status === 401) openKey();
  else if (!(error instanceof ApiError)) throw error;
});
