// The engine at work: what it holds, what runs, and how fast.

import { errorCard, get, stream } from "./api.js";
import { announce, button, duration, h, number, percent, plural, s, short } from "./dom.js";
import { treeDrawing } from "./tree.js";

const EVERY = 400, LATER = 2000, KEPT = 120; // milliseconds, milliseconds, steps
const DETAILS = "trunkline.details";

function tile(name, help) {
  const value = h("dd", { class: "num" }, "–"), more = h("div", { class: "tile-more num" });
  return { element: h("div", { class: "tile", title: help }, h("dt", null, name), value, more), set: (text, below = "") => ((value.textContent = text), more.replaceChildren(below)) };
}

function spark(values) {
  const top = Math.max(1, ...values), step = 100 / Math.max(1, values.length - 1);
  const points = values.map((value, at) => `${(at * step).toFixed(1)},${(22 - (value / top) * 20).toFixed(1)}`);
  return s("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" }, s("polyline", { points: points.join(" ") }));
}

function bar(parts, label) {
  const total = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
  return h(
    "div", { class: "stack", role: "img", "aria-label": label },
    parts.map(([kind, value]) => {
      const piece = h("i", { class: kind });
      piece.style.width = `${(value / total) * 100}%`;
      return piece;
    }),
  );
}

const PHASES = { compiling: "grammar", waiting: "waiting", running: "running" };

function requestRow(request) {
  const reads = request.computed < request.prompt_tokens;
  const cached = Math.min(request.cached_tokens, request.prompt_tokens), computed = Math.max(0, Math.min(request.computed, request.prompt_tokens) - cached);
  const share = Math.min(1, request.output_tokens / Math.max(1, request.max_output));
  const width = request.prompt_tokens * 0.6;
  const state = request.phase === "running" ? (reads ? "reads" : "writes") : request.awaits_prefix ? "waits for a prefix" : PHASES[request.phase];
  return h(
    "tr", null,
    h("th", { scope: "row", class: "num" }, `#${request.arrival}`, request.rid && h("span", { class: "rid mono" }, request.rid)),
    h("td", null, h("span", { class: `phase ${request.phase}` }, state)),
    h("td", { class: "progress" }, bar([["cached", cached], ["computed", computed], ["left", request.prompt_tokens - cached - computed], ["gap", request.prompt_tokens * 0.02], ["out", width * share], ["left", width * (1 - share)]], `${cached} prompt tokens cached, ${computed} computed, of ${request.prompt_tokens}; ${request.output_tokens} written of at most ${request.max_output}`)),
    h("td", { class: "num right" }, short(request.prompt_tokens)),
    h("td", { class: "num right" }, short(cached)),
    h("td", { class: "num right" }, short(request.output_tokens)),
  );
}

function timeline(steps, width) {
  const shown = steps.slice(-KEPT), height = 96, wide = width / KEPT;
  const top = Math.log2(2 + Math.max(15, ...shown.map((step) => step.prompt_tokens + step.decode_tokens)));
  const slow = Math.max(0.001, ...shown.map((step) => step.seconds));
  const offset = KEPT - shown.length;
  const bars = shown.flatMap((step, at) => {
    const x = (offset + at) * wide, all = step.prompt_tokens + step.decode_tokens, tall = (Math.log2(1 + all) / top) * (height - 24);
    const decode = all ? (tall * step.decode_tokens) / all : 0;
    const rect = (kind, y, tallness) => tallness > 0.3 && s("rect", { class: kind, x: x.toFixed(1), y: (height - y - tallness).toFixed(1), width: Math.max(1, wide - 1).toFixed(1), height: tallness.toFixed(1) });
    return [rect("decode", 0, decode), rect("prompt", decode, tall - decode)].filter(Boolean);
  });
  const line = shown.map((step, at) => `${((offset + at + 0.5) * wide).toFixed(1)},${(height - (step.seconds / slow) * (height - 30)).toFixed(1)}`).join(" ");
  return [s("svg", { class: "timeline", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `The last ${shown.length} steps; the slowest took ${duration(slow)}` }, bars, s("polyline", { class: "time", points: line }))];
}

export function liveView(about) {
  let details = (sessionStorage.getItem(DETAILS) ?? (about.admin_key ? "no" : "yes")) === "yes";
  let timer = null, active = false, paused = false, steps = [], samples = [], speeds = [], seen = null, pointed = null, refused = 0;
  const tiles = {
    speed: tile("Tokens per second", "Tokens sampled, over the last seconds"),
    hits: tile("Cache hit rate", "Share of the prompt tokens since the start that came from the cache"),
    kv: tile("KV pages", "In use, cached and free"),
    requests: tile("Running", "Requests that hold a row"),
    step: tile("Step time", "Median of the last steps"),
    evicted: tile("Evicted tokens", "Since the start"),
  };
  const problem = h("div");
  const info = h("div", { class: "tree-info", "aria-live": "off" });
  const drawing = treeDrawing((node) => tell((pointed = node)));
  const treeBox = h("div", { class: "tree-box" }, drawing.svg);
  const treeNote = h("p", { class: "muted small num" });
  const rows = h("tbody");
  const requestsEmpty = h("p", { class: "muted small empty-line" }, "Nothing is running.");
  const table = h("table", { class: "requests" }, h("caption", { class: "hidden-text" }, "Requests"), h("thead", null, h("tr", null, ["Request", "State", "Progress"].map((name) => h("th", { scope: "col" }, name)), ["Prompt", "Cached", "Out"].map((name) => h("th", { scope: "col", class: "right" }, name)))), rows);
  const chart = h("div", { class: "chart" });
  const chartNote = h("span", { class: "muted small num" });
  const start = button("play", "Send eight prompts that begin alike", () => demonstrate(), { text: true, kind: "small" });
  const pause = button("pause", "Pause", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.setAttribute("aria-label", paused ? "Go on" : "Pause");
    if (!paused) poll();
  }, { kind: "small", "aria-pressed": "false" });
  const toggle = h("input", { type: "checkbox", checked: details, onchange: () => {
    details = toggle.checked;
    sessionStorage.setItem(DETAILS, details ? "yes" : "no");
    poll();
  } });

  function tell(node) {
    if (node.edge) {
      const { edge } = node;
      info.replaceChildren(
        h("p", { class: "num" }, h("b", null, edge.tokens ? plural(edge.tokens, "token") : "Root of a namespace"), edge.tokens ? ` · ${edge.locks ? `held by ${plural(edge.locks, "request")}` : "held by nobody, kept until its pages are needed"}` : ""),
        edge.text ? h("code", { class: "snippet" }, edge.text, edge.tokens > 16 ? " …" : "") : "",
      );
    } else if (node.request) {
      const { request } = node;
      info.replaceChildren(h("p", { class: "num" }, h("b", null, `Request #${request.arrival}`), ` · ${number(request.prompt_tokens)} prompt tokens, ${number(request.cached_tokens)} from the cache · ${number(request.output_tokens)} written · ${plural(request.own_pages, "own page")}`), request.rid ? h("code", { class: "snippet" }, request.rid) : "");
    } else info.replaceChildren(h("p", null, `${plural(node.hidden, "more branch")}, used longer ago`.replace("branchs", "branches")));
  }

  function rates(now, counters) {
    samples.push({ now, counters });
    while (samples.length > 2 && now - samples[0].now > 3) samples.shift();
    const [old] = samples, seconds = now - old.now;
    return seconds > 0 ? (counters.generated_tokens - old.counters.generated_tokens) / seconds : 0;
  }

  function show(snapshot) {
    const { gauges, counters, edges, requests } = snapshot;
    if (seen && counters.steps < seen.counters.steps) [steps, samples, speeds] = [[], [], []]; // another engine
    steps = [...steps, ...snapshot.steps].slice(-KEPT * 2);
    const speed = rates(snapshot.now, counters);
    speeds = [...speeds, speed].slice(-90);
    tiles.speed.set(number(speed), spark(speeds));
    tiles.hits.set(counters.prompt_tokens ? percent(counters.cached_tokens / counters.prompt_tokens) : "–", `${short(counters.cached_tokens)} of ${short(counters.prompt_tokens)}`);
    const total = gauges.pages_total || 1;
    tiles.kv.set(percent(gauges.pages_in_use / total), h("div", null, bar([["used", gauges.pages_in_use], ["kept", gauges.pages_cached], ["free", gauges.pages_free]], `${gauges.pages_in_use} pages in use, ${gauges.pages_cached} cached, ${gauges.pages_free} free`), h("span", null, `${short(gauges.pages_cached)} cached, ${short(gauges.pages_free)} free`)));
    tiles.requests.set(number(gauges.running), `${number(gauges.waiting)} waiting, of ${number(about.max_running)} rows`);
    const times = steps.slice(-40).map((step) => step.seconds).sort((a, b) => a - b);
    tiles.step.set(times.length ? duration(times[times.length >> 1]) : "–", `${short(counters.steps)} steps`);
    tiles.evicted.set(short(counters.evicted_tokens), `${number(counters.retractions)} preempted`);
    const evicting = Boolean(seen && counters.evicted_tokens > seen.counters.evicted_tokens);
    drawing.draw(edges, requests, evicting);
    const held = edges.reduce((sum, edge) => sum + edge.tokens, 0), shown = edges.filter((edge) => edge.tokens).length;
    treeNote.textContent = `${plural(shown, "edge")}${snapshot.num_edges > shown ? ` of ${number(snapshot.num_edges)}` : ""} · ${plural(held, "token")}`;
    treeBox.classList.toggle("is-empty", shown === 0 && !requests.length);
    rows.replaceChildren(...requests.slice(0, 64).map(requestRow));
    table.hidden = !requests.length;
    requestsEmpty.hidden = Boolean(requests.length);
    chart.replaceChildren(...(steps.length ? timeline(steps, chart.clientWidth || 600) : [h("p", { class: "muted small empty-line" }, "Steps appear here as soon as something runs.")]));
    const last = steps.at(-1);
    chartNote.textContent = last ? `last step: ${number(last.prompt_tokens)} prompt, ${number(last.decode_tokens)} decode, ${plural(last.rows, "row")}, ${duration(last.seconds)}` : "";
    seen = snapshot;
  }

  async function poll() {
    clearTimeout(timer);
    if (!active || document.hidden || paused) return;
    let wait = EVERY;
    try {
      const since = steps.at(-1)?.step ?? -1;
      const snapshot = await get(`v1/live${details ? "/details" : ""}?since=${since}`);
      if (!active) return;
      if (Date.now() - refused > 6000) problem.replaceChildren(); // a refusal stays long enough to be read
      show(snapshot);
    } catch (error) {
      wait = LATER;
      if (details && (error.status === 401 || error.status === 403)) {
        details = toggle.checked = false;
        sessionStorage.setItem(DETAILS, "no");
        announce("Texts need the administrator's key");
        wait = EVERY;
      }
      problem.replaceChildren(errorCard(error));
      refused = Date.now();
    }
    clearTimeout(timer);
    timer = setTimeout(poll, wait);
  }

  async function demonstrate() {
    start.disabled = true;
    const trunk = "You are a careful assistant of a small library by the sea. You answer in short and plain sentences, you never guess, and you say so when you do not know something. ";
    const branches = ["The visitor is a child. ", "The visitor is a sailor. "];
    const asks = ["What is 3 + 4?", "What is 17 + 15?", "Spell the word river.", "Sort these numbers from small to large: 42, 7, 19"];
    const run = async (branch, ask) => {
      const body = { messages: [{ role: "system", content: trunk + branch }, { role: "user", content: ask }], max_tokens: 400, temperature: 1, ignore_eos: true, stream: true };
      for await (const event of stream("v1/chat/completions", body)) void event;
    };
    try {
      await Promise.all(branches.flatMap((branch, i) => asks.map(async (ask, j) => {
        await new Promise((done) => setTimeout(done, 250 * (i * 4 + j)));
        await run(branch, ask);
      })));
    } catch (error) {
      problem.replaceChildren(errorCard(error));
    }
    start.disabled = false;
  }

  const card = (title, more, ...content) => h("section", { class: "card", "aria-label": title }, h("div", { class: "card-top" }, h("h2", null, title), more), content);
  const legend = h("span", { class: "legend" }, h("span", null, h("i", { class: "swatch prompt" }), "prompt"), h("span", null, h("i", { class: "swatch decode" }), "decode"), h("span", null, h("i", { class: "swatch time" }), "time"));
  const element = h(
    "section", { class: "pane", "aria-label": "Live" },
    h("div", { class: "scroller" }, h("div", { class: "column broad live" }, problem, h("dl", { class: "tiles" }, Object.values(tiles).map((one) => one.element)),
      card("Radix tree", [treeNote, h("span", { class: "wide" }), h("label", { class: "switch plain small" }, h("span", null, "Texts and ids"), toggle), start], treeBox, h("p", { class: "tree-empty muted" }, "The cache is empty. Prompts that begin alike will share a trunk here."), info),
      h("div", { class: "pair" }, card("Steps", [legend, h("span", { class: "wide" }), chartNote], chart), card("Requests", null, requestsEmpty, h("div", { class: "table-wrap" }, table))))),
  );
  info.append(h("p", { class: "muted small" }, "Green is held by running requests, and thicker the more of them share it. Gray stays cached until its pages are needed."));
  new ResizeObserver(() => seen && active && drawing.draw(seen.edges, seen.requests, false)).observe(treeBox);
  return {
    element,
    title: "The engine, live",
    panel: null,
    tools: [pause],
    shown: () => ((active = true), poll()),
    hidden: () => ((active = false), clearTimeout(timer)),
    visible: (now) => now && poll(),
    pointed: () => pointed,
  };
}
