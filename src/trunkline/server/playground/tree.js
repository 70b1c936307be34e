// The radix tree as a drawing: edges grow to the right, as long as their tokens; requests hang where they are.

import { number, plural, s, short, still } from "./dom.js";

const ROW = 26, LEFT = 14, LEAST = 30, LABEL = 132, TWEEN = 380, FADE = 900, LEAST_WIDTH = 620;

const shownText = (text) => text.replace(/\s+/g, " ").trim();

// Places of all edges and requests, for a drawing of this width.
export function layout(edges, requests, width) {
  const nodes = new Map(edges.map((edge) => [`e${edge.number}`, { id: `e${edge.number}`, edge, children: [], parent: edge.parent ? `e${edge.parent}` : null }]));
  const roots = [];
  for (const node of nodes.values()) (nodes.get(node.parent)?.children ?? roots).push(node);
  for (const request of requests) {
    const at = nodes.get(`e${request.edge}`);
    if (request.phase === "running" && at) at.children.push({ id: `r${request.arrival}`, request, children: [], parent: at.id });
  }
  for (const node of [...nodes.values()]) {
    if (node.edge.hidden > 0) node.children.push({ id: `h${node.edge.number}`, hidden: node.edge.hidden, children: [], parent: node.id });
  }
  const all = [];
  let rows = 0, stretch = Infinity;
  const order = (a, b) => (a.edge ? 0 : 1) - (b.edge ? 0 : 1) || (a.edge?.number ?? a.request?.arrival ?? 0) - (b.edge?.number ?? b.request?.arrival ?? 0);
  const walk = (node, depth, length) => {
    const own = node.edge ? Math.sqrt(node.edge.tokens) : 0;
    node.length = length + own;
    node.depth = depth + (node.edge?.tokens ? 1 : 0);
    all.push(node);
    node.children.sort(order);
    if (!node.children.length) node.y = rows++ * ROW + ROW;
    else {
      node.children.forEach((child) => walk(child, node.depth, node.length));
      node.y = (node.children[0].y + node.children.at(-1).y) / 2;
    }
    if (node.length > 0) stretch = Math.min(stretch, (width - LEFT - LABEL - node.depth * LEAST) / node.length);
  };
  roots.sort(order).forEach((root) => walk(root, 0, 0));
  const scale = Number.isFinite(stretch) ? Math.max(0.4, stretch) : 1;
  const byId = new Map(all.map((node) => [node.id, node]));
  for (const node of all) {
    const parent = byId.get(node.parent);
    node.x0 = parent ? parent.x : LEFT;
    node.y0 = parent ? parent.y : node.y;
    node.x = node.edge ? LEFT + node.depth * LEAST + node.length * scale : node.x0 + 34;
  }
  return { all, byId, height: rows * ROW + ROW };
}

function curve({ x0, y0, x, y }) {
  const bend = Math.min(26, (x - x0) * 0.9);
  return `M${x0} ${y0}C${x0 + bend * 0.6} ${y0} ${x0 + bend * 0.4} ${y} ${x0 + bend} ${y}L${x} ${y}`;
}

export function treeDrawing(onpoint) {
  const svg = s("svg", { class: "tree", role: "tree", "aria-label": "The radix tree of cached prefixes", tabindex: "-1" });
  const shapes = new Map(); // id -> { group, path, ..., at: place now, from, to }
  let current = new Map(), focused = null, moving = 0;

  function shape(node) {
    const kind = node.edge ? (node.edge.tokens ? "edge" : "root") : node.request ? "request" : "more";
    const path = s("path", { class: "line" }), dot = s("circle", { class: "dot", r: kind === "request" ? 5 : 3 });
    const ring = kind === "request" && s("circle", { class: "ring", r: 8, pathLength: 100 });
    const label = s("text", { class: "label" });
    const group = s("g", { class: kind, role: "treeitem", tabindex: "-1", "data-id": node.id }, path, ring, dot, label);
    svg.append(group);
    const start = { x0: node.x0, y0: node.y0, x: node.x0, y: node.y0 };
    return { group, path, dot, ring, label, kind, at: start, from: start, to: start };
  }

  function place(own) {
    const { x, y, x0 } = own.at;
    own.path.setAttribute("d", curve(own.at));
    own.dot.setAttribute("cx", x);
    own.dot.setAttribute("cy", y);
    if (own.ring) own.ring.setAttribute("transform", `translate(${x} ${y}) rotate(-90)`);
    own.label.setAttribute("x", own.kind === "edge" ? Math.min(x0 + 28, x) : x + 14);
    own.label.setAttribute("y", own.kind === "edge" ? y - 5 : y + 4);
  }

  function dress(own, node) {
    const { edge, request } = node, room = Math.floor((node.x - node.x0 - 30) / 6.2);
    let text = "", name = "";
    if (edge) {
      own.group.classList.toggle("held", edge.locks > 0);
      own.path.style.strokeWidth = edge.tokens ? (1.5 + Math.log2(1 + edge.locks) * 1.3).toFixed(1) : 0;
      own.group.style.opacity = edge.locks || !edge.tokens ? 1 : Math.max(0.45, 1 - edge.idle / 400).toFixed(2);
      text = edge.tokens ? short(edge.tokens) : "";
      if (edge.text) text = `${text}  ${shownText(edge.text)}`;
      text = text.length > room ? `${text.slice(0, Math.max(String(short(edge.tokens)).length, room - 1))}` : text;
      if (room < String(short(edge.tokens)).length) text = "";
      name = edge.tokens ? `${plural(edge.tokens, "token")}, ${edge.locks ? `held by ${plural(edge.locks, "request")}` : "held by nobody"}` : "Root";
    } else if (request) {
      const target = request.computed < request.prompt_tokens ? request.computed / request.prompt_tokens : request.output_tokens / Math.max(1, request.max_output);
      own.ring.style.strokeDasharray = `${Math.min(100, target * 100).toFixed(1)} 100`;
      own.group.classList.toggle("prefill", request.computed < request.prompt_tokens);
      text = request.computed < request.prompt_tokens ? `reads ${number(request.computed)}/${number(request.prompt_tokens)}` : `writes ${number(request.output_tokens)}`;
      name = `Request ${request.arrival}, ${text}`;
    } else {
      text = name = `${number(node.hidden)} more`;
    }
    if (own.label.textContent !== text) own.label.textContent = text;
    own.group.setAttribute("aria-label", name);
    own.group.setAttribute("aria-level", node.depth + 1);
  }

  function draw(edges, requests, evicting) {
    const width = Math.max(LEAST_WIDTH, svg.parentElement?.clientWidth ?? 0), { all, byId, height } = layout(edges, requests, width);
    for (const [id, own] of shapes) {
      if (byId.has(id) || own.leaving) continue;
      own.leaving = true;
      own.group.classList.add(evicting && own.kind === "edge" ? "evicted" : "gone");
      own.group.removeAttribute("data-id");
      setTimeout(() => own.group.remove(), still() ? 0 : FADE);
      shapes.delete(id);
    }
    for (const node of all) {
      let own = shapes.get(node.id);
      if (!own) shapes.set(node.id, (own = shape(node)));
      dress(own, node);
      own.from = own.at;
      own.to = { x0: node.x0, y0: node.y0, x: node.x, y: node.y };
    }
    current = byId;
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    const entry = focused && byId.has(focused) ? focused : all[0]?.id;
    for (const [id, own] of shapes) own.group.setAttribute("tabindex", id === entry ? "0" : "-1");
    tween();
    if (focused && byId.has(focused)) onpoint(byId.get(focused));
  }

  function tween() {
    const started = performance.now(), own = ++moving, ease = (t) => 1 - (1 - t) ** 3;
    const frame = () => {
      if (own !== moving) return;
      const t = still() ? 1 : Math.min(1, (performance.now() - started) / TWEEN), e = ease(t);
      for (const one of shapes.values()) {
        const mix = (name) => one.from[name] + (one.to[name] - one.from[name]) * e;
        one.at = { x0: mix("x0"), y0: mix("y0"), x: mix("x"), y: mix("y") };
        place(one);
      }
      if (t < 1) requestAnimationFrame(frame);
    };
    frame();
  }

  const idOf = (event) => event.target.closest?.("[data-id]")?.dataset.id;
  const point = (event) => {
    const id = idOf(event);
    if (id && current.has(id)) onpoint(current.get((focused = id)));
  };
  svg.addEventListener("pointerover", point);
  svg.addEventListener("focusin", point);
  svg.addEventListener("click", point);
  svg.addEventListener("keydown", (event) => {
    const node = current.get(focused);
    if (!node) return;
    const visible = [...current.values()].sort((a, b) => a.y - b.y || a.x - b.x), at = visible.indexOf(node);
    const to = { ArrowLeft: current.get(node.parent), ArrowRight: node.children[0], ArrowDown: visible[at + 1], ArrowUp: visible[at - 1], Home: visible[0], End: visible.at(-1) }[event.key];
    if (!to) return;
    event.preventDefault();
    const next = shapes.get(to.id).group;
    shapes.get(focused).group.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
  return { svg, draw };
}
