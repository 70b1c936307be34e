// What was in force for an answer, and who said so: the request, the model, the server, or nobody.

import { getExact } from "./api.js";
import { h } from "./dom.js";
import { PARAMETERS } from "./settings.js";

const SOURCES = { request: "asked for", model: "the model's own", server: "the server", interface: "default" };
const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function row([name, { value, source, why }]) {
  return h("tr", null, h("th", { scope: "row" }, PARAMETERS[name]?.[0] ?? h("code", null, name)), h("td", { class: "num" }, shown(value)), h("td", { class: "muted" }, why ? `${SOURCES[source] ?? source}: ${why}` : (SOURCES[source] ?? source)));
}

const table = (rows) => h("div", { class: "table-wrap" }, h("table", { class: "force" }, h("caption", { class: "hidden-text" }, "Parameters that were in force"), h("tbody", null, rows.map(row))));

// Numbers may be larger than those of this language: they come as text.
export async function inForce(rid) {
  const found = await getExact(`effective_parameters/${encodeURIComponent(rid)}`);
  const all = Object.entries(found.prompts[0].parameters), own = all.filter(([, one]) => one.source !== "interface");
  const rest = all.filter(([, one]) => one.source === "interface");
  return h("div", { class: "in-force" }, h("h3", null, "What was in force"), table(own), h("details", null, h("summary", { class: "link" }, `${rest.length} more at their defaults`), table(rest)));
}
