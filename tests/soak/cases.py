"""What the soak asks, and what of an answer must be the same each time (P19)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

SYSTEMS = ("You are a helpful assistant.", "You answer briefly.", "You are a careful clerk. " * 8)
QUESTIONS = (
    "What is 17 + 15?",
    "Who are you?",
    "Sort these numbers: 9, 4, 7, 1",
    "Spell the word lantern.",
    "Tell me what you can do.",
    "What is 6 x 7? Answer with the number.",
)
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
ANTHROPIC_TOOL = {
    "tools": [{"name": "weather", "input_schema": CITY}],
    "tool_choice": {"type": "any"},
    "max_tokens": 64,
}
RESPONSES_TOOL = {
    "tools": [{"type": "function", "name": "weather", "parameters": CITY}],
    "tool_choice": "required",
    "max_output_tokens": 64,
}
# Ids and times, and what depends on what the cache holds and who else runs.
CHANGING = frozenset(
    "id created created_at completed_at rid call_id request_id previous_response_id background usage "
    "cached_tokens num_retractions e2e_latency total_duration load_duration prompt_eval_duration "
    "eval_duration".split()
)
# Kinds that take several calls, in `clients.py`. A client does not leave them on the way.
SCRIPTS = ("session", "conversation", "background", "cancel", "batch")


@dataclass(frozen=True)
class Case:
    """One request body; the same body always gets the same answer."""

    kind: str
    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def cases(seed: int, each: int = 4) -> list[Case]:
    """`each` bodies of every kind: greedy and sampled, with shared prompts, with and without stop strings."""
    rng = random.Random(seed)
    found = []
    for _ in range(each):
        found += [_chat(rng, "chat"), _chat(rng, "chat stream", stream=True), _chat(rng, "chat n", n=3)]
        found += [_chat(rng, "tools", stream=rng.random() < 0.5, tools=[TOOL], tool_choice="required")]
        found += [_messages(rng, "messages", False), _messages(rng, "messages stream", True)]
        found += [_messages(rng, "messages tools", rng.random() < 0.5, **ANTHROPIC_TOOL)]
        found += [_ollama(rng, "/api/chat"), _ollama(rng, "/api/generate"), _ollama(rng, "/api/chat", True)]
        found += [_response(rng, "response", store=False), _response(rng, "response stream", stream=True)]
        found += [_response(rng, "response tools", stream=rng.random() < 0.5, **RESPONSES_TOOL)]
        found += [_response(rng, "conversation"), _response(rng, "background", background=True)]
        found += [_response(rng, "cancel", background=True, max_output_tokens=400)]
        found += [_batch(rng)]
        found += [_generate(rng, "generate", return_logprob=True, logprob_start_len=0, top_logprobs_num=2)]
        found += [_generate(rng, "generate stream", stream=True)]
        found += [_generate(rng, "session", max_new_tokens=rng.randrange(2, 12))]
        found += [_completions(rng), _grammar(rng, new=False), _grammar(rng, new=True)]
        texts = rng.sample(QUESTIONS, rng.randrange(1, 4))
        found += [Case("embeddings", "/v1/embeddings", {"input": texts})]
        found += [Case("rerank", "/v1/rerank", {"query": rng.choice(QUESTIONS), "documents": texts})]
        found += [_generate(rng, "abort", max_new_tokens=400, ignore_eos=True)]
    return found


def _messages_of(rng: random.Random) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": rng.choice(SYSTEMS)},
        {"role": "user", "content": rng.choice(QUESTIONS)},
    ]


def _sampling(rng: random.Random) -> dict[str, Any]:
    return {"temperature": rng.choice([0, 0.8, 1.2]), "seed": rng.randrange(1000)}


def _chat(rng: random.Random, kind: str, **more: Any) -> Case:
    body = {"messages": _messages_of(rng), "max_tokens": rng.randrange(4, 48), **_sampling(rng), **more}
    if "tools" in more:
        body["max_tokens"] = 64
    elif rng.random() < 0.3:
        body["stop"] = [rng.choice(["e", "\n", "7", "am"])]
    return Case(kind, "/v1/chat/completions", body)


def _messages(rng: random.Random, kind: str, stream: bool, **more: Any) -> Case:
    system, user = _messages_of(rng)
    body = {"system": system["content"], "messages": [user], "max_tokens": rng.randrange(4, 32), **more}
    return Case(kind, "/v1/messages", {**body, "temperature": 0, "stream": stream})


def _ollama(rng: random.Random, path: str, stream: bool = False) -> Case:
    system, user = _messages_of(rng)
    options = {"num_predict": rng.randrange(4, 32), **_sampling(rng)}
    asked = {"messages": [system, user]}
    if path == "/api/generate":
        asked = {"system": system["content"], "prompt": user["content"]}
    kind = f"ollama {path.rpartition('/')[2]}{' stream' if stream else ''}"
    return Case(kind, path, {"model": "", **asked, "options": options, "stream": stream})


def _response(rng: random.Random, kind: str, **more: Any) -> Case:
    system, user = _messages_of(rng)
    body = {"instructions": system["content"], "input": user["content"], "temperature": 0}
    return Case(kind, "/v1/responses", {**body, "max_output_tokens": rng.randrange(16, 40), **more})


def _batch(rng: random.Random) -> Case:
    """The body is that of the batch; `lines` are the bodies of its file."""
    url = "/v1/chat/completions"
    lines = [_chat(rng, "line").body for _ in range(3)]
    return Case("batch", "/v1/batches", {"endpoint": url, "completion_window": "24h", "lines": lines})


def _generate(rng: random.Random, kind: str, **more: Any) -> Case:
    own = {name: more.pop(name) for name in ("max_new_tokens", "ignore_eos") if name in more}
    heat = {"temperature": rng.choice([0, 1.0]), "sampling_seed": rng.randrange(1000)}
    sampling = {"max_new_tokens": rng.randrange(4, 40), **heat, **own}
    return Case(kind, "/generate", {"text": rng.choice(QUESTIONS), "sampling_params": sampling, **more})


def _completions(rng: random.Random) -> Case:
    body = {"prompt": [rng.choice(QUESTIONS), rng.choice(SYSTEMS)], "n": 2, "logprobs": 2, "max_tokens": 16}
    return Case("completions n", "/v1/completions", {**body, **_sampling(rng)})


def _grammar(rng: random.Random, *, new: bool) -> Case:
    """`new`: a grammar that `one_of` writes differently each time, so that it is compiled each time."""
    if new:
        body = {"text": rng.choice(QUESTIONS), "sampling_params": {"max_new_tokens": 12, "temperature": 0}}
        body["sampling_params"]["regex"] = f"[a-{rng.choice('mnopq')}]{{2,9}}"
        return Case("grammar new", "/generate", body)
    schema = {"name": "s", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    form = {"type": "json_schema", "json_schema": schema}
    return _chat(rng, "grammar", response_format=form)


def one_of(case: Case, number: int) -> Case:
    """The case as the `number`-th request of the run sends it: same answer, a grammar not seen before."""
    if case.kind != "grammar new":
        return case
    letters = "".join("abcdefghij"[int(digit)] for digit in str(number))  # they are in the class already
    sampling = dict(case.body["sampling_params"])
    sampling["regex"] = sampling["regex"].replace("]", letters + "]")
    return Case(case.kind, case.path, {**case.body, "sampling_params": sampling})


def essence(answer: Any) -> Any:
    """An answer without what differs from one time to the next."""
    if isinstance(answer, dict):
        return {name: essence(value) for name, value in answer.items() if name not in CHANGING}
    return [essence(value) for value in answer] if isinstance(answer, list) else answer


def extended(text: str, event: dict[str, Any]) -> str:
    """The text of a stream after one more event of any of the routes."""
    if "error" in event or event.get("type") == "error":
        raise RuntimeError(f"error in the stream: {event}")
    if "meta_info" in event:
        return str(event["text"])  # /generate repeats all of it
    if "done" in event:  # Ollama
        return text + (event["message"]["content"] if "message" in event else event["response"])
    if "choices" not in event:
        delta = event.get("delta", "")
        if isinstance(delta, str):  # a response's
            return text + delta
        return text + delta.get("text", "") + delta.get("partial_json", "")
    for choice in event["choices"]:
        delta = choice["delta"]
        text += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
        for call in delta.get("tool_calls") or ():
            text += call["function"].get("name", "") + call["function"].get("arguments", "")
    return text
