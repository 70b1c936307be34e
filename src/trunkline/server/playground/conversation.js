// A conversation is a tree: each edit or new answer is a branch beside the old one.

const STORE = "trunkline.conversation";

export class Conversation {
  constructor() {
    this.nodes = new Map([[0, { id: 0, role: "root", children: [], active: 0 }]]);
    this.next = 1;
  }

  add(parent, fields) {
    const node = { id: this.next++, parent, children: [], active: 0, content: "", ...fields };
    this.nodes.set(node.id, node);
    const above = this.nodes.get(parent);
    above.active = above.children.push(node.id) - 1;
    return node;
  }

  // Along the branches that are shown.
  path(upto = null) {
    const found = [];
    let at = this.nodes.get(0);
    while (at.children.length) {
      at = this.nodes.get(at.children[at.active]);
      found.push(at);
      if (at.id === upto) break;
    }
    return found;
  }

  get tail() {
    return this.path().at(-1)?.id ?? 0;
  }

  siblings(node) {
    const above = this.nodes.get(node.parent);
    return { at: above.children.indexOf(node.id), count: above.children.length };
  }

  show(node, step) {
    const above = this.nodes.get(node.parent);
    above.active = Math.max(0, Math.min(above.children.length - 1, above.children.indexOf(node.id) + step));
  }

  remove(node) {
    const above = this.nodes.get(node.parent);
    above.children = above.children.filter((id) => id !== node.id);
    above.active = Math.max(0, Math.min(above.active, above.children.length - 1));
    const forget = (id) => {
      this.nodes.get(id).children.forEach(forget);
      this.nodes.delete(id);
    };
    forget(node.id);
  }

  // What the server is sent: the shown branch down to `id`.
  messages(id) {
    const path = id === 0 ? [] : this.path(id);
    return path.filter((node) => !node.failed).map((node) => {
      if (node.role !== "assistant") return { role: node.role, content: node.content, ...(node.callId ? { tool_call_id: node.callId } : {}) };
      const calls = (node.answer?.calls ?? []).filter(Boolean).map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
      const reasoning = node.answer?.reasoning;
      return { role: "assistant", content: node.answer?.text ?? node.content, ...(calls.length ? { tool_calls: calls } : {}), ...(reasoning ? { reasoning_content: reasoning } : {}) };
    });
  }

  save() {
    const nodes = [...this.nodes.values()].map(({ running, prompt, ...node }) => (node.answer ? { ...node, answer: { ...node.answer, tokens: node.answer.tokens.slice(0, 2000), done: true } } : node));
    try {
      sessionStorage.setItem(STORE, JSON.stringify({ next: this.next, nodes }));
    } catch {
      /* too large for the store: it lasts as long as the page */
    }
  }

  static restore() {
    const conversation = new Conversation();
    try {
      const stored = JSON.parse(sessionStorage.getItem(STORE));
      if (stored?.nodes?.length) {
        conversation.nodes = new Map(stored.nodes.map((node) => [node.id, node]));
        conversation.next = stored.next;
      }
    } catch {
      /* nothing usable is stored */
    }
    return conversation;
  }
}
