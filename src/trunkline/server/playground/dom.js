// Building the page without ever parsing HTML: text stays text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.setAttribute("class", value);
    else if (["value", "checked", "disabled", "open", "selected", "indeterminate"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const s = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

const ICONS = {
  send: "M4 12h15M13 6l6 6-6 6",
  stop: "M7 7h10v10H7z",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M20 12a8 8 0 1 1-2.5-5.8M20 3v4.5h-4.5",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  tokens: "M3 6h6v5H3zM12 6h9v5h-9zM3 14h9v5H3zM15 14h6v5h-6z",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  down: "M6 9l6 6 6-6",
  key: "M20 8a4 4 0 1 1-8 0 4 4 0 0 1 8 0M13 11l-9 9M7 17l3 3",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M17 8a2 2 0 1 1-4 0 2 2 0 0 1 4 0M11 16a2 2 0 1 1-4 0 2 2 0 0 1 4 0",
  close: "M6 6l12 12M18 6L6 18",
  link: "M10 14a4 4 0 0 0 6 0l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6 0l-3 3a4 4 0 0 0 6 6l1-1",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M5 19l1.4-1.4M17.6 6.4L19 5",
  moon: "M20 14A8 8 0 0 1 10 4a8 8 0 1 0 10 10z",
  half: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  plus: "M12 5v14M5 12h14",
  check: "M5 12l5 5 9-10",
  play: "M8 5l11 7-11 7z",
  pause: "M8 5v14M16 5v14",
  branch: "M4 12h5c5 0 4-6 9-6h2M9 12c5 0 4 6 9 6h2",
};

export function icon(name) {
  return s("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, s("path", { d: ICONS[name] }));
}

// A button with an icon and a name; `label` is shown only where `text` is set.
export function button(name, label, onclick, { text = false, kind = "", ...props } = {}) {
  return h(
    "button",
    { type: "button", class: `button ${text ? "" : "bare"} ${kind}`, "aria-label": text ? null : label, title: text ? null : label, onclick, ...props },
    name && icon(name),
    text && h("span", null, label),
  );
}

let announced = 0;
export function announce(text) {
  const own = ++announced;
  const place = document.getElementById("announcer");
  place.textContent = "";
  setTimeout(() => own === announced && (place.textContent = text), 60);
}

export const number = (value) => Math.round(value).toLocaleString("en-US");
export const percent = (share) => (share >= 0.9995 ? "100%" : share === 0 ? "0%" : share < 0.001 && share > 0 ? "<0.1%" : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)}%`);
export const short = (value) => (value >= 1e6 ? `${(value / 1e6).toFixed(1)}M` : value >= 1e4 ? `${(value / 1e3).toFixed(0)}k` : value >= 1000 ? `${(value / 1e3).toFixed(1)}k` : `${Math.round(value)}`);
export const duration = (seconds) => (seconds < 0.001 ? `${(seconds * 1e6).toFixed(0)} µs` : seconds < 0.1 ? `${(seconds * 1e3).toFixed(1)} ms` : seconds < 1 ? `${(seconds * 1e3).toFixed(0)} ms` : `${seconds.toFixed(2)} s`);
export const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Runs `work` at most once a frame (or soon, in a tab that is not shown).
export function eachFrame(work) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    const run = () => due && ((due = false), work());
    requestAnimationFrame(run);
    setTimeout(run, 200);
  };
}

export async function copyText(text, where) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "hidden-text", value: text, "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    where?.focus();
  }
  announce("Copied");
  if (where) {
    where.classList.add("done");
    setTimeout(() => where.classList.remove("done"), 1200);
  }
}

// Does what draws `element` anew, and keeps the focus in its place, counted from the end.
export function keepingFocus(element, work) {
  const stops = () => [...element.querySelectorAll("button, textarea, summary")].reverse();
  const at = stops().indexOf(document.activeElement);
  work();
  if (at >= 0) stops()[at]?.focus({ preventScroll: true });
}

// Text areas as high as their text.
export function grow(area, most = 320) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(most, area.scrollHeight + 2)}px`;
  };
  area.addEventListener("input", fit);
  requestAnimationFrame(fit);
  return area;
}
