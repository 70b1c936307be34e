"""From requests in text to chunks of text: the one pipeline under HTTP routes and the offline Engine.

    prompt -> validate, tokenise -> n core requests -> tokens -> detokenise, stop strings -> chunks

A response that is not streamed is the same chunks, joined (P3).
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from trunkline.config.schema import SECRETS, EngineConfig
from trunkline.engine.constraint import Constraint
from trunkline.engine.drain import DrainRate
from trunkline.engine.fields import INT64_MAX
from trunkline.engine.journal import Journal, Origin, Record
from trunkline.engine.prefix_miss import miss_report
from trunkline.engine.sessions import SessionRef, Sessions, Turn
from trunkline.grammar.protocol import GrammarError
from trunkline.messages import AddRequest, Done, PauseMode, ProfileDone, Ready, Snapshot, Stats, TokensOut
from trunkline.text.output import OutputText
from trunkline.text.reasoning import Reasoning, ReasoningMeter, ReasoningSplitter
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import (
    CacheKey,
    Explain,
    FinishReason,
    LogprobParams,
    Pooling,
    RequestError,
    SamplingParams,
    Thinking,
    Timing,
    TokenLogprobs,
)

PART = 256  # requests of one step each that run at once, of a call with more


class Health(Protocol):
    """Whether the core makes progress, and if not, why."""

    @property
    def ok(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class CoreClient(Protocol):
    """What the frontend needs of `engine.client.EngineClient`."""

    @property
    def ready(self) -> Ready | None: ...
    @property
    def health(self) -> Health: ...
    @property
    def paused(self) -> bool: ...
    def stream(self, request: AddRequest) -> AsyncGenerator[TokensOut, None]: ...
    async def abort(self, rid: str) -> None: ...
    async def abort_anywhere(self, rid: str) -> None: ...
    async def abort_all(self) -> None: ...
    async def end_session(self, session: str) -> None: ...
    async def flush_cache(self) -> Done: ...
    async def pause(self, mode: PauseMode) -> Done: ...
    async def resume(self) -> Done: ...
    async def stats(self) -> Stats: ...
    async def snapshot(self) -> Snapshot: ...
    async def start_profile(
        self,
        *,
        folder: str,
        name: str,
        num_steps: int | None,
        activities: list[Literal["CPU", "GPU"]],
        with_stack: bool,
        record_shapes: bool,
    ) -> ProfileDone: ...
    async def stop_profile(self) -> ProfileDone: ...


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and what to do with it. `params.n` completions come out.

    `clip_output`: `max_new_tokens` is only a default; where the context leaves less, it shrinks instead of
    refusing the request. `add_special_tokens`: text of a chat template has its own. `shown`: texts that
    are shown although they are special tokens. `pooling`: the answer is a vector, no token.
    """

    rid: str
    prompt: str | list[int]
    params: SamplingParams = SamplingParams()
    logprobs: LogprobParams | None = None
    cache_salt: str = ""
    priority: int | None = None  # None: the server's default
    add_special_tokens: bool = True
    clip_output: bool = False
    constraint: Constraint | None = None
    reasoning: Reasoning | None = None
    max_thinking_tokens: int | None = None
    session: SessionRef | None = None  # what comes before `prompt`
    pooling: Pooling | None = None
    explain_prefix: bool = False  # report where the prompt left the prefix cache
    shown: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that passed all checks: its prompt as token ids, its parameters complete (seed, output
    limit). `turn`: its place in a session, which the prompt begins with."""

    request: GenerationRequest
    token_ids: list[int]
    params: SamplingParams
    turn: Turn | None = None
    thinking: Thinking | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """News of one completion. Counts are totals so far; `text`, `reasoning`, `token_ids` and `logprobs` are
    new. `reasoning` comes before `text`, of which it is no part.

    `index` counts completions over all prompts of a call: prompt x n + i. `prompt_logprobs`, `timing` and
    `prefix_miss` come once, with the first chunk. The last chunk of a completion has `finish`.
    """

    index: int
    rid: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    retractions: int
    forced_tokens: int = 0  # of completion_tokens: those that the grammar dictated
    forced: Sequence[int] = ()  # indices into `token_ids` of the new ones among them
    embedding: bytes = b""  # of a pooled request, with its last chunk: float32, little-endian
    reasoning: str = ""
    reasoning_tokens: int | None = None  # of completion_tokens; None: nobody looks for reasoning
    finish: FinishReason | None
    timing: Timing | None = None
    prefix_miss: dict[str, Any] | None = None
    detokenize: float = 0.0  # seconds so far, of calls that are traced


class Frontend:
    """Owns the text side of all live requests. One per process, on one event loop."""

    def __init__(self, client: CoreClient, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self.client = client
        self.tokenizer = tokenizer
        assert client.ready is not None, "the client has not started"
        self.ready = client.ready
        self.config = config
        self.draining = False  # told to stop: what runs goes on, and no more should be sent here
        self._seeds = random.Random(config.model.seed)
        self._capacity = config.scheduler.max_queued + client.ready.max_running
        self._live: dict[str, list[str]] = {}  # rid -> rids in the core
        self._drain = DrainRate()
        server = config.server
        self.sessions = Sessions(
            server.max_sessions, server.max_session_tokens, server.session_timeout, self._forget_session
        )
        self._forgetting: set[asyncio.Task[None]] = set()
        self.journal = Journal()

    @property
    def num_live(self) -> int:
        """Completions in progress."""
        return sum(map(len, self._live.values()))

    # ------------------------------------------------------------------ validation
    async def prepare_all(self, requests: Sequence[GenerationRequest]) -> list[Prepared]:
        """`prepare` for each; an error names the prompt. A full server refuses before any work is done."""
        self._check_room(self._at_once([request.params for request in requests]))
        batch = []
        for position, request in enumerate(requests):
            await asyncio.sleep(0)  # others get their turn between the prompts of a long list
            try:
                batch.append(await self.prepare(request))
            except RequestError as error:
                raise _at_prompt(position, len(requests), error) from error
        return batch

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Check and tokenise. Raises RequestError for whatever this engine could not honour."""
        self.check_health()
        self._check_priority(request)
        turn = None
        if request.session is not None:
            self.need_one_process("a session", request.session.param("id"))
            turn = self.sessions.find(request.session, request.cache_salt)
        prefix = [] if turn is None else turn.prefix
        if isinstance(request.prompt, str):
            special = request.add_special_tokens and not prefix
            token_ids = await self.tokenizer.encode_async(request.prompt, add_special_tokens=special)
        else:
            token_ids = request.prompt
            self._check_tokens("input_ids", token_ids)
        token_ids = prefix + token_ids if prefix else token_ids
        params = request.params
        self._check_tokens("logit_bias", params.logit_bias)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        if request.logprobs is not None:
            self._check_tokens("token_ids_logprob", request.logprobs.token_ids)
            self._check_logprob_start(request.logprobs.prompt_start, len(token_ids))
        limit = self._output_limit(request, len(token_ids))
        seed = params.sampling_seed
        if seed is None:
            seed = self._seeds.getrandbits(62)
        return Prepared(
            request=request,
            token_ids=token_ids,
            params=msgspec.structs.replace(params, max_new_tokens=limit, sampling_seed=seed),
            turn=turn,
            thinking=self._thinking(request),
        )

    def _thinking(self, request: GenerationRequest) -> Thinking | None:
        if request.reasoning is None or not request.reasoning.gates:
            return None
        mark = request.reasoning.format.end
        end = self.tokenizer.encode(mark, add_special_tokens=False)
        if len(end) != 1:
            raise RequestError(
                f"this model's tokenizer has no token {mark}: where its reasoning ends can't be told",
                code="no_reasoning",
                param="require_reasoning",
            )
        return Thinking(tuple(end), request.max_thinking_tokens)

    def _check_priority(self, request: GenerationRequest) -> None:
        if self.config.scheduler.refuse_priority and request.priority is not None:
            raise RequestError(
                "this server lets no request name a priority (--abort-on-priority-when-disabled)",
                code="priority_disabled",
                param="priority",
            )

    def need_one_process(self, what: str, param: str | None = None) -> None:
        """Raises RequestError where several API processes serve: what lives in one of them is not found in
        the others."""
        count = self.config.server.processes
        if count > 1:
            raise RequestError(
                f"{what} needs one API process, this server has {count}: start it with "
                "--tokenizer-worker-num 1",
                code="needs_one_process",
                param=param,
                status=501,
            )

    def check_health(self) -> None:
        """Raises RequestError (503) while the core makes no progress."""
        health = self.client.health
        if not health.ok:
            raise RequestError(
                f"the engine is not available: {health.reason}", code="engine_dead", status=503
            )

    def _check_tokens(self, name: str, token_ids: Sequence[int] | dict[int, float]) -> None:
        vocab_size = self.ready.vocab_size
        bad = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"{name} holds token id {bad}; the model's vocabulary is [0, {vocab_size})",
                code="token_out_of_range",
                param=name,
            )

    @staticmethod
    def _check_logprob_start(start: int | None, prompt_tokens: int) -> None:
        if start is not None and start > prompt_tokens:
            raise RequestError(
                f"logprob_start_len is {start}, the prompt has only {prompt_tokens} tokens",
                code="logprob_start_out_of_range",
                param="logprob_start_len",
            )

    def _output_limit(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Most tokens this output may have."""
        context = min(self.ready.max_context, self.ready.num_pages * self.ready.page_size)
        if prompt_tokens == 0:
            raise RequestError(
                "the prompt has no tokens: send at least one", code="empty_prompt", param="prompt"
            )
        if prompt_tokens >= context:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens; the context length is {context}, prompt and output "
                "together: shorten the prompt",
                code="context_length_exceeded",
                param="prompt",
            )
        params, room = request.params, context - prompt_tokens
        limit = room if params.max_new_tokens is None else params.max_new_tokens
        if limit > room and not request.clip_output:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens and max_new_tokens is {limit}, together "
                f"{prompt_tokens + limit}; the context length is {context}: ask for at most {room}",
                code="context_length_exceeded",
                param="max_new_tokens",
            )
        limit = min(limit, room)
        if params.min_new_tokens > limit:
            raise RequestError(
                f"min_new_tokens is {params.min_new_tokens}, but at most {limit} tokens can be generated",
                code="min_tokens_too_large",
                param="min_new_tokens",
            )
        return limit

    # ------------------------------------------------------------------ generation
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """All chunks of one request; `prepare` and `run` in one."""
        async with aclosing(self.run([await self.prepare(request)])) as chunks:
            async for chunk in chunks:
                yield chunk

    def run(self, batch: Sequence[Prepared], record: Record | None = None) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions of all prompts, as they come. Closing the generator, or a failure of one
        completion, aborts the others. Raises RequestError, which names the prompt if there are several.

        Of many prompts that take one step each, some run at a time: such a list may be longer than the queue.
        `record`: of the call, where `journal.begin` has made one already.
        """
        record = record or self.journal.begin(Origin())
        return self.journal.watch(record, batch, self._run(batch, record.traced))

    async def _run(self, batch: Sequence[Prepared], traced: bool) -> AsyncGenerator[Chunk, None]:
        size = self._at_once([prepared.params for prepared in batch])
        if size >= len(batch):
            parts = [self._run_together(batch, traced)]
        else:
            starts = range(0, len(batch), size)
            parts = [self._run_together(batch[at : at + size], traced, at, several=True) for at in starts]
        for part in parts:
            async with aclosing(part) as chunks:
                async for chunk in chunks:
                    yield chunk

    def _at_once(self, params: Sequence[SamplingParams]) -> int:
        """How many completions of a call are to be in the engine together."""
        count = sum(one.n for one in params)
        short = all(one.n == 1 and one.max_new_tokens in (0, 1) for one in params)
        return min(count, PART, self._capacity) if short else count

    async def _run_together(
        self, batch: Sequence[Prepared], traced: bool, first: int = 0, several: bool = False
    ) -> AsyncGenerator[Chunk, None]:
        """`batch` is what the call has from prompt `first` on, perhaps not to its end."""
        count = sum(prepared.params.n for prepared in batch)
        self._check_room(count)
        rids = [prepared.request.rid for prepared in batch]
        taken = next((rid for i, rid in enumerate(rids) if rid in self._live or rid in rids[:i]), None)
        if taken is not None:
            raise RequestError(
                f"a request with id {taken!r} is still running: ids of live requests are unique",
                code="duplicate_rid",
                param="rid",
            )
        streams: list[AsyncGenerator[Chunk, None]] = []
        replaced: list[str] = []
        try:
            for position, prepared in enumerate(batch):
                explain = self._explain(prepared.request)
                adds = _expand(prepared, self.config, explain, traced)
                if prepared.turn is not None:
                    adds, others = _enter_session(prepared, prepared.turn, adds)
                    replaced += others
                self._live[prepared.request.rid] = [add.rid for add in adds]
                for number, add in enumerate(adds):
                    stream = self._complete(prepared, add, first + len(streams), number)
                    alone = len(batch) == 1 and not several
                    streams.append(stream if alone else _naming_prompt(stream, first + position))
            for rid in replaced:
                await self.client.abort(rid)
            async with aclosing(streams[0] if count == 1 else _merge(streams)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            for prepared in batch:
                self._live.pop(prepared.request.rid, None)
                if prepared.turn is not None:
                    prepared.turn.end()

    def _explain(self, request: GenerationRequest) -> Explain:
        """The tree's own tokens come from other requests: shown to whoever has a namespace of his own, or
        where the server is told that all its clients may read each other's prompts."""
        if not request.explain_prefix:
            return "no"
        return "tokens" if request.cache_salt or self.config.observe.prefix_miss_tokens else "counts"

    def _check_room(self, count: int) -> None:
        if count > self._capacity:
            raise RequestError(
                f"{count} completions in one request; this server holds {self._capacity} at once "
                "(--max-queued-requests raises it)",
                code="too_many_completions",
                param="n",
            )
        if self.num_live + count > self._capacity:
            raise RequestError(
                f"{self.num_live} completions are running or waiting; the limit is {self._capacity}: "
                "retry later (--max-queued-requests raises it)",
                code="queue_full",
                status=429,
                retry_after=self.retry_after(count),
            )

    def retry_after(self, count: int) -> int:
        """Seconds in which there should be room for `count` completions, and a tenth of the queue besides."""
        wanted = count + self._capacity // 10  # of which other processes see their part end
        return self._drain.seconds(math.ceil(wanted / self.config.server.processes))

    async def _complete(
        self, prepared: Prepared, add: AddRequest, index: int, number: int
    ) -> AsyncGenerator[Chunk, None]:
        """One completion, from its core request: the one with this number of its prompt."""
        reasoning = prepared.request.reasoning
        meter = None if reasoning is None else ReasoningMeter(reasoning)
        splitter = None if reasoning is None else ReasoningSplitter(reasoning)
        shown = self.tokenizer.special_ids_of(prepared.request.shown)
        interval = prepared.params.stream_interval
        begun, held = False, None  # the first token is told at once
        text = OutputText(self.tokenizer, prepared.params, shown=shown, meter=meter)
        forced, detokenize, traced = 0, 0.0, add.trace
        cached = retractions = 0  # kept: the last output of an aborted request does not know them
        async with aclosing(self.client.stream(add)) as outputs:
            async for out in outputs:
                if out.finish is not None and out.finish.kind == "abort" and out.finish.status is not None:
                    raise self._refusal(out.finish, prepared)
                began = time.perf_counter() if traced else 0.0
                delta, used, finish = text.feed(out.token_ids, out.finish)
                thought, delta = _split(splitter, delta, finish is not None)
                detokenize += time.perf_counter() - began if traced else 0.0
                miss = out.prefix_miss
                dictated = [index for index in out.forced if index < used]
                forced += len(dictated)
                cached, retractions = max(cached, out.cached_tokens), max(retractions, out.retractions)
                chunk = Chunk(
                    index=index,
                    rid=prepared.request.rid,
                    text=delta,
                    token_ids=out.token_ids[:used],
                    logprobs=None if out.logprobs is None else out.logprobs[:used],
                    prompt_logprobs=out.prompt_logprobs,
                    prompt_tokens=len(prepared.token_ids),
                    completion_tokens=text.num_tokens,
                    cached_tokens=cached,
                    retractions=retractions,
                    forced_tokens=forced,
                    forced=dictated,
                    embedding=out.embedding,
                    reasoning=thought,
                    reasoning_tokens=None if meter is None else meter.tokens,
                    finish=finish,
                    timing=out.timing,
                    prefix_miss=None if miss is None else miss_report(miss, self.tokenizer),
                    detokenize=detokenize,
                )
                if prepared.turn is not None:
                    prepared.turn.extend(number, chunk.token_ids, finished=finish is not None)
                if held is not None and held.text and thought:  # order is kept: reasoning comes before text
                    yield held
                    held = None
                held = chunk if held is None else _joined(held, chunk)
                if finish is not None:
                    self._drain.ended()
                    break
                if not begun or len(held.token_ids) >= interval:
                    begun = True
                    yield held
                    held = None
            else:
                raise RequestError(
                    "the engine ended a request without a result", code="internal_error", status=500
                )
        yield held  # after the core request is closed, so that a stop string has freed its memory already

    def _refusal(self, finish: FinishReason, prepared: Prepared) -> RequestError:
        constraint = prepared.request.constraint
        if finish.pointer is not None and constraint is not None:
            field, pointer = constraint.locate(finish.pointer)
            return GrammarError(
                finish.message or "this grammar is not supported",
                code=finish.code or "unsupported_grammar",
                param=field,
                pointer=pointer,
            )
        return RequestError(
            finish.message or "the engine ended the request",
            code=finish.code or "internal_error",
            param=finish.param,
            status=finish.status or 500,
            retry_after=self.retry_after(1) if finish.status in (429, 503) else None,
        )

    async def abort(self, rid: str) -> None:
        """End all completions of a request; its chunks end with finish "abort". Unknown ids are ignored."""
        await self.abort_own(rid)
        if self.config.server.processes > 1:
            await self.client.abort_anywhere(rid)

    async def abort_own(self, rid: str) -> None:
        """`abort`, of a request of this process."""
        for core_rid in self._live.get(rid, ()):
            await self.client.abort(core_rid)

    def _forget_session(self, key: str) -> None:
        task = asyncio.get_running_loop().create_task(self.client.end_session(key))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    def describe(self) -> dict[str, Any]:
        """Configuration and facts of the running engine, without secrets."""
        config: dict[str, Any] = msgspec.to_builtins(self.config)
        for name in SECRETS:
            config["server"][name] = None if config["server"][name] is None else "set"
        ready: dict[str, Any] = msgspec.to_builtins(self.ready)
        sessions = {"open": self.sessions.num_open, "tokens": self.sessions.num_tokens}
        return {
            **config,
            "sessions": sessions,
            "ready": {name: value for name, value in ready.items() if name != "type"},
        }


def _split(splitter: ReasoningSplitter | None, text: str, last: bool) -> tuple[str, str]:
    """(reasoning, answer) of the next text."""
    if splitter is None:
        return "", text
    thought, answer = splitter.feed(text)
    if last:
        more, rest = splitter.flush()
        return thought + more, answer + rest
    return thought, answer


def _joined(first: Chunk, second: Chunk) -> Chunk:
    """Two pieces of news as one."""
    logprobs = (first.logprobs or []) + (second.logprobs or [])
    return msgspec.structs.replace(
        second,
        text=first.text + second.text,
        reasoning=first.reasoning + second.reasoning,
        token_ids=first.token_ids + second.token_ids,
        logprobs=None if first.logprobs is None and second.logprobs is None else logprobs,
        prompt_logprobs=first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs,
        forced=[*first.forced, *(len(first.token_ids) + at for at in second.forced)],
        timing=first.timing if second.timing is None else second.timing,
        prefix_miss=first.prefix_miss if second.prefix_miss is None else second.prefix_miss,
    )


def _expand(prepared: Prepared, config: EngineConfig, explain: Explain, traced: bool) -> list[AddRequest]:
    request, params = prepared.request, prepared.params
    seed = params.sampling_seed or 0
    key = CacheKey(salt=request.cache_salt, weight_version=config.model.weight_version)
    default = config.scheduler.default_priority
    return [
        AddRequest(
            rid=request.rid if params.n == 1 else f"{request.rid}-{i}",
            token_ids=prepared.token_ids,
            params=msgspec.structs.replace(params, n=1, sampling_seed=(seed + i) & INT64_MAX),
            logprobs=request.logprobs,
            cache_key=key,
            priority=default if request.priority is None else request.priority,
            grammar=None if request.constraint is None else request.constraint.spec,
            thinking=prepared.thinking,
            pooling=request.pooling,
            explain_prefix="no" if i else explain,
            trace=traced,
        )
        for i in range(params.n)
    ]


def _enter_session(
    prepared: Prepared, turn: Turn, adds: Sequence[AddRequest]
) -> tuple[list[AddRequest], list[str]]:
    """Returns the completions with their places in the session, and the ids of requests that they replace."""
    prompt, salt = prepared.token_ids[len(turn.prefix) :], prepared.request.cache_salt
    replaced = turn.begin([add.rid for add in adds], prompt, salt)
    return [msgspec.structs.replace(add, turn=turn.of(i)) for i, add in enumerate(adds)], replaced


def _at_prompt(position: int, count: int, error: RequestError) -> RequestError:
    if count == 1:
        return error
    message = f"prompt {position}: {error.message}"
    return RequestError(
        message, code=error.code, param=error.param, status=error.status, retry_after=error.retry_after
    )


async def _naming_prompt(stream: AsyncGenerator[Chunk, None], position: int) -> AsyncGenerator[Chunk, None]:
    try:
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                yield chunk
    except RequestError as error:
        raise _at_prompt(position, 2, error) from error


async def _merge(streams: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[Chunk, None]:
    """Chunks of several completions in order of arrival. The first failure ends all."""
    queue: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[Chunk, None]) -> None:
        try:
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    queue.put_nowait(chunk)
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        live = len(tasks)
        while live:
            item = await queue.get()
            if item is None:
                live -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
