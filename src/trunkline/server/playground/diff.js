// Where two texts differ, word by word (Myers 1986, the greedy algorithm, bounded).

const LIMIT = 400; // most edits looked for; texts further apart are told apart as wholes

const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];

// Two lists of [text, whether it is only here], joined where alike.
export function compareTexts(left, right) {
  const a = words(left), b = words(right);
  let start = 0, enda = a.length, endb = b.length;
  while (start < enda && start < endb && a[start] === b[start]) start++;
  while (enda > start && endb > start && a[enda - 1] === b[endb - 1]) enda--, endb--;
  const kept = common(a.slice(start, enda), b.slice(start, endb));
  const mark = (list, from, to, own) => list.map((word, at) => [word, at >= from && at < to && !own.has(at - from)]);
  return [join(mark(a, start, enda, kept[0])), join(mark(b, start, endb, kept[1]))];
}

function join(parts) {
  const joined = [];
  for (const [text, only] of parts) {
    if (joined.length && joined.at(-1)[1] === only) joined.at(-1)[0] += text;
    else joined.push([text, only]);
  }
  return joined;
}

// Places in a and in b that belong to a longest common subsequence.
function common(a, b) {
  const ina = new Set(), inb = new Set(), reach = new Map([[1, 0]]), trace = [];
  for (let edits = 0; edits <= Math.min(a.length + b.length, LIMIT); edits++) {
    trace.push(new Map(reach));
    for (let k = -edits; k <= edits; k += 2) {
      const down = k === -edits || (k !== edits && reach.get(k - 1) < reach.get(k + 1));
      let x = down ? reach.get(k + 1) : reach.get(k - 1) + 1, y = x - k;
      while (x < a.length && y < b.length && a[x] === b[y]) x++, y++;
      reach.set(k, x);
      if (x >= a.length && y >= b.length) {
        walkBack(trace, a, b, ina, inb);
        return [ina, inb];
      }
    }
  }
  return [ina, inb];
}

function walkBack(trace, a, b, ina, inb) {
  let x = a.length, y = b.length;
  for (let edits = trace.length - 1; edits >= 0; edits--) {
    const reach = trace[edits], k = x - y;
    const before = k === -edits || (k !== edits && reach.get(k - 1) < reach.get(k + 1)) ? k + 1 : k - 1;
    const px = reach.get(before), py = px - before;
    while (x > px && y > py && x > 0 && y > 0) ina.add(--x), inb.add(--y);
    x = px;
    y = py;
  }
}

// The first character that differs; -1 where the texts are equal.
export function firstDifference(left, right) {
  if (left === right) return -1;
  let at = 0;
  while (at < left.length && at < right.length && left[at] === right[at]) at++;
  return at;
}
