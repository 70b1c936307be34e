// Does a value keep to a JSON schema? The parts of the language that the server compiles, but for formats.

export function violations(schema, value, root = schema, path = "", depth = 0) {
  if (schema === true || depth > 60) return [];
  if (schema === false) return [`${path || "the value"} is not allowed`];
  if (schema.$ref) return violations(follow(root, schema.$ref), value, root, path, depth + 1);
  const wrong = [], name = path || "the value", say = (text) => wrong.push(`${name} ${text}`);
  const below = (sub, part, at) => wrong.push(...violations(sub, part, root, at, depth + 1));
  const holds = (sub) => violations(sub, value, root, path, depth + 1).length === 0;
  const types = [schema.type ?? []].flat();
  if (types.length && !types.some((type) => isType(value, type))) return [`${name} is not of type ${types.join(" or ")}`];
  if (schema.enum && !schema.enum.some((one) => same(one, value))) say("is none of the values of enum");
  if ("const" in schema && !same(schema.const, value)) say("is not the const value");
  for (const part of schema.allOf ?? []) below(part, value, path);
  if (schema.anyOf && !schema.anyOf.some(holds)) say("fits none of anyOf");
  if (schema.oneOf && schema.oneOf.filter(holds).length !== 1) say("fits not exactly one of oneOf");
  if (typeof value === "number") {
    if (value < schema.minimum || value <= schema.exclusiveMinimum) say("is too small");
    if (value > schema.maximum || value >= schema.exclusiveMaximum) say("is too large");
  } else if (typeof value === "string") {
    const length = [...value].length;
    if (length < schema.minLength || length > schema.maxLength) say("has the wrong length");
    if (schema.pattern && !matches(schema.pattern, value)) say("does not match its pattern");
  } else if (Array.isArray(value)) {
    if (value.length < schema.minItems || value.length > schema.maxItems) say("has the wrong number of items");
    const fixed = schema.prefixItems ?? [];
    value.forEach((item, at) => {
      const sub = fixed[at] ?? schema.items;
      if (sub !== undefined) below(sub, item, `${path}/${at}`);
    });
  } else if (value !== null && typeof value === "object") {
    for (const one of schema.required ?? []) if (!Object.hasOwn(value, one)) say(`has no ${one}`);
    for (const [key, item] of Object.entries(value)) {
      const known = schema.properties && Object.hasOwn(schema.properties, key);
      if (known) below(schema.properties[key], item, `${path}/${key}`);
      else if (schema.additionalProperties !== undefined) below(schema.additionalProperties, item, `${path}/${key}`);
    }
  }
  return wrong;
}

function isType(value, type) {
  if (type === "null") return value === null;
  if (type === "array") return Array.isArray(value);
  if (type === "integer") return Number.isInteger(value);
  if (type === "object") return value !== null && typeof value === "object" && !Array.isArray(value);
  return typeof value === type;
}
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
function matches(pattern, value) {
  try {
    return new RegExp(pattern, "u").test(value);
  } catch {
    return true; // written for another kind of regular expressions
  }
}
function follow(root, ref) {
  if (!ref.startsWith("#")) return true;
  return ref.split("/").slice(1).reduce((at, part) => at?.[part.replaceAll("~1", "/").replaceAll("~0", "~")], root) ?? true;
}
