// A small Markdown that builds nodes itself: no text of a model is ever read as HTML.

import { button, copyText, h } from "./dom.js";

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|__(.+?)__|(?<![\w*])\*(?!\s)(.+?)(?<!\s)\*(?!\w)|(?<!\w)_(?!\s)(.+?)(?<!\s)_(?!\w)|~~(.+?)~~|\[([^\]\n]*)\]\(([^()\s]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/s;

function inline(text, depth = 0) {
  const nodes = [];
  while (text) {
    const found = depth < 6 && text.length < 4000 ? text.match(INLINE) : null;
    if (!found) {
      nodes.push(text);
      break;
    }
    if (found.index) nodes.push(text.slice(0, found.index));
    const [whole, , code, strong, strong2, em, em2, struck, label, target, bare] = found;
    const deeper = (part) => inline(part, depth + 1);
    if (code !== undefined) nodes.push(h("code", null, code.trim() || code));
    else if (strong ?? strong2) nodes.push(h("strong", null, deeper(strong ?? strong2)));
    else if (em ?? em2) nodes.push(h("em", null, deeper(em ?? em2)));
    else if (struck) nodes.push(h("del", null, deeper(struck)));
    else nodes.push(link(bare ?? target, bare ? [bare] : deeper(label || target)) ?? whole);
    text = text.slice(found.index + whole.length);
  }
  return nodes;
}

function link(target, label) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return null;
  return h("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const copy = button("copy", "Copy code", () => copyText(text, copy), { kind: "small" });
  return h("div", { class: "code-block" }, h("div", { class: "code-top" }, h("span", null, language || "text"), copy), h("pre", { tabindex: "0" }, h("code", null, text)));
}

const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(rows) {
  const [head, , ...body] = rows;
  return h(
    "div", { class: "table-wrap" },
    h("table", null, h("thead", null, h("tr", null, cells(head).map((cell) => h("th", { scope: "col" }, inline(cell))))), h("tbody", null, body.map((row) => h("tr", null, cells(row).map((cell) => h("td", null, inline(cell))))))),
  );
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines) {
  const base = lines[0].match(ITEM)[1].length, items = [];
  for (const line of lines) {
    const found = line.match(ITEM);
    if (found && found[1].length <= base + 1) items.push([found[3]]);
    else items.at(-1).push(line.slice(Math.min(base + 2, line.search(/\S|$/))));
  }
  const first = lines[0].match(ITEM)[2], ordered = /\d/.test(first);
  return h(ordered ? "ol" : "ul", ordered ? { start: parseInt(first, 10) } : null, items.map((item) => h("li", null, blocks(item, true))));
}

function blocks(lines, tight = false, depth = 0) {
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at], fence = line.match(/^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/);
    const take = (until) => {
      const from = at;
      while (++at < lines.length && !until(lines[at]));
      return lines.slice(from, at);
    };
    if (!line.trim()) at++;
    else if (fence) {
      const body = take((next) => next.trim().startsWith(fence[1]) && !next.trim().slice(fence[1].length).trim()).slice(1);
      at++;
      nodes.push(codeBlock(body, fence[2]));
    } else if (/^#{1,6}\s/.test(line)) {
      const level = Math.min(6, line.match(/^#+/)[0].length + 2);
      nodes.push(h(`h${level}`, { class: "md-head" }, inline(line.replace(/^#+\s+|\s+#+\s*$/g, ""))));
      at++;
    } else if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) nodes.push(h("hr")), at++;
    else if (/^\s{0,3}>/.test(line) && depth < 5) nodes.push(h("blockquote", null, blocks(take((next) => !/^\s{0,3}>/.test(next)).map((one) => one.replace(/^\s{0,3}>\s?/, "")), false, depth + 1)));
    else if (ITEM.test(line)) nodes.push(list(take((next) => !next.trim() || (!ITEM.test(next) && !/^\s{2,}/.test(next)))));
    else if (line.includes("|") && /^\s*\|?[\s:-]+\|[\s|:-]*$/.test(lines[at + 1] ?? "")) nodes.push(table(take((next) => !next.includes("|"))));
    else {
      const text = take((next) => !next.trim() || /^\s{0,3}(`{3,}|~{3,}|#{1,6}\s|>)/.test(next) || ITEM.test(next));
      const parts = text.flatMap((one, i) => (i ? [h("br"), ...inline(one)] : inline(one)));
      nodes.push(tight && nodes.length === 0 ? parts : h("p", null, parts));
    }
  }
  return nodes.flat();
}

export function markdown(text) {
  return h("div", { class: "md" }, blocks(text.split("\n")));
}
