// One request and the answers that come of it, whichever route it takes.

import { post, stream } from "./api.js";
import { chatBody, rawBody } from "./settings.js";

function answer() {
  return { text: "", reasoning: "", calls: [], tokens: [], finish: null, usage: null, done: false, error: null, prompt: null };
}

// What a model writes between these is its reasoning, where the server has not told it apart already.
export function splitThinking(text) {
  const begun = text.match(/^\s*<think>\n?/);
  if (!begun) return { reasoning: "", text };
  const end = text.indexOf("</think>");
  if (end < 0) return { reasoning: text.slice(begun[0].length), text: "" };
  return { reasoning: text.slice(begun[0].length, end).trim(), text: text.slice(end + 8).replace(/^\s+/, "") };
}

class Run {
  constructor(onnews) {
    this.answers = [];
    this.usage = {};
    this.started = performance.now();
    this.first = this.last = null;
    this.onnews = onnews;
  }
  at(index) {
    while (this.answers.length <= index) this.answers.push(answer());
    return this.answers[index];
  }
  tick() {
    this.last = performance.now();
    this.first ??= this.last;
  }
  get figures() {
    const made = this.usage.completion ?? this.answers.reduce((sum, one) => sum + one.tokens.length, 0);
    const spread = (this.last - this.first) / 1000, total = (this.last - this.started) / 1000;
    const rate = spread > 0.02 ? (made - this.answers.length) / spread : made / total; // a burst says nothing
    return {
      ...this.usage,
      id: this.id,
      completion: made,
      ttft: this.first === null ? null : (this.first - this.started) / 1000,
      speed: made > this.answers.length && total > 0 ? rate : null,
    };
  }
}

async function runChat(run, settings, messages, signal) {
  const body = { ...chatBody(settings, messages), stream: true, stream_options: { include_usage: true } };
  for await (const event of stream("v1/chat/completions", body, signal)) {
    run.id ??= event.id;
    if (event.usage) {
      run.usage = {
        prompt: event.usage.prompt_tokens,
        completion: event.usage.completion_tokens,
        cached: event.usage.prompt_tokens_details?.cached_tokens ?? 0,
        forced: event.usage.completion_tokens_details?.forced_tokens ?? 0,
        miss: event.usage.prompt_tokens_details?.prefix_miss,
      };
    }
    for (const choice of event.choices ?? []) {
      const one = run.at(choice.index), delta = choice.delta ?? {};
      if (delta.content || delta.reasoning_content || delta.tool_calls || choice.logprobs) run.tick();
      one.raw = (one.raw ?? "") + (delta.content ?? "");
      const split = splitThinking(one.raw);
      one.text = split.text;
      one.told = (one.told ?? "") + (delta.reasoning_content ?? "");
      one.reasoning = one.told || split.reasoning;
      for (const part of delta.tool_calls ?? []) {
        const call = (one.calls[part.index] ??= { id: "", name: "", arguments: "" });
        call.id = part.id ?? call.id;
        call.name += part.function?.name ?? "";
        call.arguments += part.function?.arguments ?? "";
      }
      for (const entry of choice.logprobs?.content ?? []) {
        one.tokens.push({ text: entry.token, logprob: entry.logprob, forced: Boolean(entry.forced), top: entry.top_logprobs.map((other) => [other.token, other.logprob]) });
      }
      if (choice.finish_reason) one.finish = choice.finish_reason;
    }
    run.onnews(run);
  }
}

async function runRaw(run, settings, text, signal) {
  const made = [];
  for await (const event of stream("generate", { ...rawBody(settings, text), stream: true }, signal)) {
    run.id ??= event.meta_info.id;
    const index = event.index ?? 0, one = run.at(index), meta = event.meta_info;
    if (event.output_ids.length) run.tick();
    one.text = event.text;
    const forced = new Set(meta.forced ?? []), entries = meta.output_token_logprobs ?? [];
    for (let at = one.tokens.length; at < entries.length; at++) {
      const top = meta.output_top_logprobs?.[at] ?? [];
      one.tokens.push({ text: entries[at][2], logprob: entries[at][0], forced: forced.has(at), top: top.map((other) => [other[2], other[0]]) });
    }
    made[index] = [meta.completion_tokens, meta.forced_tokens ?? 0];
    run.usage = { prompt: meta.prompt_tokens, cached: meta.cached_tokens, completion: sum(made, 0), forced: sum(made, 1), miss: meta.prefix_miss };
    if (meta.finish_reason) one.finish = meta.finish_reason.type;
    run.onnews(run);
  }
}
const sum = (rows, at) => rows.reduce((total, row) => total + (row?.[at] ?? 0), 0);

// Runs to the end. What came before an error or a stop is kept; `run.error` says what happened.
export async function generate(settings, input, { signal, onnews }) {
  const run = new Run(onnews);
  run.error = null;
  run.stopped = false;
  try {
    if (typeof input === "string") await runRaw(run, settings, input, signal);
    else await runChat(run, settings, input, signal);
  } catch (error) {
    if (error.name === "AbortError") run.stopped = true;
    else run.error = error;
  }
  for (const one of run.answers) one.done = true;
  onnews(run);
  return run;
}

// The tokens that the model read, as [id, text] pairs.
export async function promptTokens(settings, input) {
  if (typeof input === "string") return (await post("v1/playground/prompt", { text: input })).tokens;
  return (await post("v1/playground/prompt", chatBody(settings, input))).tokens;
}
