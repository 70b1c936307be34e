"""The offline engine: the same pipeline as the server's, called from Python. Shapes are SGLang's `Engine`."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from trunkline.config.cli import from_kwargs
from trunkline.config.flags import Args
from trunkline.config.resolve import load_config
from trunkline.engine.client import EngineClient
from trunkline.engine.effective import effective_parameters
from trunkline.engine.fields import INT32_MAX, SAMPLING_FIELDS, read_fields
from trunkline.engine.frontend import Frontend
from trunkline.engine.journal import Origin
from trunkline.engine.native import (
    CLOSE_SESSION_FIELDS,
    GENERATE_FIELDS,
    OPEN_SESSION_FIELDS,
    NativeCall,
    answers,
    join_answers,
    parse_call,
)
from trunkline.engine.profiling import PROFILE_FIELDS, start_profile, stop_profile
from trunkline.engine.reranking import Ranker, ranks_of
from trunkline.engine.scoring import ScoreResult, parse_score, scores_of
from trunkline.engine.vectors import check_dimensions, parse_encode, vectors_of
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.reasoning import ReasoningFormat, reasoning_format
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import RequestError

NAMES: Mapping[str, str] = {name: f"sampling_params.{name}" for name in SAMPLING_FIELDS}

T = TypeVar("T")
Answer = dict[str, Any]


class Engine:
    """A model in this process.

        with Engine(model_path="...") as engine:
            print(engine.generate("Hello", {"max_new_tokens": 8})["text"])

    Keyword arguments are the flags of `trunkline serve` with underscores; unknown ones are refused by name.
    `generate` may be called from several threads at once; everything runs together in one batch. Raises
    RequestError when the engine can't start.
    """

    def __init__(self, **server_args: Any) -> None:
        resolved = load_config(from_kwargs(server_args, Args))
        scheduler = msgspec.structs.replace(
            resolved.config.scheduler, max_queued=INT32_MAX
        )  # callers are bound
        observe = msgspec.structs.replace(resolved.config.observe, prefix_miss_tokens=True)
        self.config = msgspec.structs.replace(resolved.config, scheduler=scheduler, observe=observe)
        self.tokenizer = Tokenizer.load(self.config.model.tokenizer_path or self.config.model.path)
        folder, server = self.config.model.tokenizer_path or self.config.model.path, self.config.server
        template = ChatTemplate.load(folder, self.tokenizer.special_tokens, server.chat_template)
        self._reasoning = reasoning_format(
            server.reasoning_parser, "" if template is None else template.source
        )
        self._ranker = Ranker(template, self.tokenizer, self.config.model.pooling)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trunkline-frontend", daemon=True)
        self._thread.start()
        try:
            start = EngineClient.in_process(self.config)
            self._client = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        except BaseException:
            _stop_loop(self._loop, self._thread)
            raise
        self._frontend = Frontend(self._client, self.tokenizer, self.config)
        # Called once: by shutdown, when nobody holds the engine any more, or at exit (a thread that computes
        # while the interpreter goes down can crash it).
        self._close = weakref.finalize(self, _close, self._client, self._loop, self._thread)

    # ------------------------------------------------------------------ generation
    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """Generate for one prompt (a dict) or a list of prompts, or n > 1 completions (a list of dicts).

        `fields` are those of POST /generate: return_logprob, logprob_start_len, top_logprobs_num,
        token_ids_logprob, return_text_in_logprobs, return_prompt_token_ids, rid, priority, cache_salt, ...
        With `stream`, an iterator of dicts whose text is cumulative; those of a list carry "index".
        Raises RequestError; for a list it names the prompt, and the other prompts are aborted.
        """
        call = _parse(prompt, sampling_params, input_ids, stream, fields, self._reasoning)
        if stream:
            return self._iterate(call)
        return self._wait(self._gather(call))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: Mapping[str, Any] | list[Mapping[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | AsyncIterator[Answer]:
        """`generate` for asyncio: awaits without blocking the caller's loop. Cancelling aborts."""
        call = _parse(prompt, sampling_params, input_ids, stream, fields, self._reasoning)
        if stream:
            return self._iterate_async(call)
        return await asyncio.wrap_future(self._submit(self._gather(call)))

    def encode(
        self,
        prompt: str | list[str] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Answer | list[Answer]:
        """The vector of a text (a dict with "embedding", of length 1), or of each in a list.

        `fields` are those of POST /encode: dimensions, rid, priority, cache_salt, ... Raises RequestError.
        """
        return self._wait(self._encode(_given({"text": prompt, "input_ids": input_ids}, fields)))

    async def async_encode(
        self,
        prompt: str | list[str] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Answer | list[Answer]:
        """`encode` for asyncio."""
        body = _given({"text": prompt, "input_ids": input_ids}, fields)
        return await asyncio.wrap_future(self._submit(self._encode(body)))

    async def _encode(self, body: Mapping[str, Any]) -> Answer | list[Answer]:
        call = parse_encode(body, self.config.model.pooling)
        check_dimensions(call.dimensions, self._frontend.ready.hidden_size)
        batch = await self._frontend.prepare_all(call.requests)
        chunks = self._frontend.run(batch)
        whole: Answer | list[Answer] = await vectors_of(call, batch, chunks, self.config.model.weight_version)
        return whole

    def score(
        self,
        query: str | list[int],
        items: str | list[str] | list[list[int]],
        label_token_ids: list[int],
        apply_softmax: bool = False,
        item_first: bool = False,
        **fields: Any,
    ) -> ScoreResult:
        """How likely each label token follows each item behind the query: among all tokens, or with
        `apply_softmax` among the labels. `fields` are others of POST /v1/score. Raises RequestError."""
        named: Answer = {"query": query, "items": items, "label_token_ids": label_token_ids}
        named |= {"apply_softmax": apply_softmax, "item_first": item_first}
        return self._wait(self._score(_given(named, fields)))

    async def async_score(
        self,
        query: str | list[int],
        items: str | list[str] | list[list[int]],
        label_token_ids: list[int],
        apply_softmax: bool = False,
        item_first: bool = False,
        **fields: Any,
    ) -> ScoreResult:
        """`score` for asyncio."""
        named: Answer = {"query": query, "items": items, "label_token_ids": label_token_ids}
        named |= {"apply_softmax": apply_softmax, "item_first": item_first}
        result: ScoreResult = await asyncio.wrap_future(self._submit(self._score(_given(named, fields))))
        return result

    async def _score(self, body: Mapping[str, Any]) -> ScoreResult:
        call = parse_score(body)
        batch = await self._frontend.prepare_all(call.requests)
        return await scores_of(call, self._frontend.run(batch))

    def rerank(self, prompt: Sequence[Sequence[str]], **fields: Any) -> list[Answer]:
        """How well the document answers the query of each pair (query, document), in the order given.

        A dict each: "score", the same as "embedding" (SGLang's name), and "meta_info". What a score is, and
        `fields`, such as instruct, are those of POST /v1/rerank. Raises RequestError.
        """
        return self._wait(self._rerank(_given({"prompt": prompt}, fields)))

    async def async_rerank(self, prompt: Sequence[Sequence[str]], **fields: Any) -> list[Answer]:
        """`rerank` for asyncio."""
        body = _given({"prompt": prompt}, fields)
        results: list[Answer] = await asyncio.wrap_future(self._submit(self._rerank(body)))
        return results

    async def _rerank(self, body: Mapping[str, Any]) -> list[Answer]:
        ranking = self._ranker.parse(body)
        batch = await self._frontend.prepare_all(ranking.requests)
        ranks = await ranks_of(ranking, self._frontend.run(batch))
        return [{"score": one.score, "embedding": one.score, "meta_info": one.meta} for one in ranks]

    async def _answers(self, call: NativeCall) -> AsyncGenerator[Answer, None]:
        """Runs on the engine's loop."""
        record = self._frontend.journal.begin(Origin(body=call.body, names=NAMES))
        batch = await self._frontend.prepare_all(call.requests)
        version = self.config.model.weight_version
        events = answers(call, batch, self._frontend.run(batch, record), self.tokenizer, version)
        async with aclosing(events):
            async for answer in events:
                yield answer

    async def _gather(self, call: NativeCall) -> Answer | list[Answer]:
        async with aclosing(self._answers(call)) as events:
            whole: Answer | list[Answer] = join_answers(call, [answer async for answer in events])
        return whole

    def _iterate(self, call: NativeCall) -> Iterator[Answer]:
        items: queue.SimpleQueue[Answer | Exception | None] = queue.SimpleQueue()
        future = self._submit(self._pump(call, items.put))
        try:
            while (item := items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            future.cancel()

    async def _iterate_async(self, call: NativeCall) -> AsyncGenerator[Answer, None]:
        items: asyncio.Queue[Answer | Exception | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        future = self._submit(
            self._pump(call, lambda item: loop.call_soon_threadsafe(items.put_nowait, item))
        )
        try:
            while (item := await items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            future.cancel()

    async def _pump(self, call: NativeCall, put: Any) -> None:
        try:
            async with aclosing(self._answers(call)) as answers:
                async for answer in answers:
                    put(answer)
        except Exception as error:
            put(error)
        else:
            put(None)

    # ------------------------------------------------------------------ sessions
    def open_session(
        self,
        capacity_of_str_len: int = 0,
        session_id: str | None = None,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Open a session that `session_params` of `generate` can go on from; returns its id.

        `capacity_of_str_len`: most tokens it may store, 0: what `max_session_tokens` leaves. Raises
        RequestError when it exists, or too many are open.
        """
        given: dict[str, Any] = {"capacity_of_str_len": capacity_of_str_len, "session_id": session_id}
        return self._wait(self._open_session({**given, "streaming": streaming, "timeout": timeout}))

    async def _open_session(self, given: Mapping[str, Any]) -> str:
        return self._frontend.sessions.open(**read_fields(OPEN_SESSION_FIELDS, given))

    def close_session(self, session_id: str) -> None:
        """Raises RequestError for one that is not open."""
        self._wait(self._close_session({"session_id": session_id}))

    async def _close_session(self, given: Mapping[str, Any]) -> None:
        self._frontend.sessions.close(**read_fields(CLOSE_SESSION_FIELDS, given))

    # ------------------------------------------------------------------ control
    def flush_cache(self) -> bool:
        """Empty the prefix cache; False while requests are running."""
        return self._wait(self._client.flush_cache()).ok

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End a request, or all; their answers have finish reason "abort"."""
        self._wait(self._client.abort_all() if abort_all else self._frontend.abort(rid))

    def start_profile(self, **fields: Any) -> str:
        """Profile steps from now on; `fields` are those of POST /start_profile. Returns the trace's path."""
        checked = read_fields(PROFILE_FIELDS, fields)
        return self._wait(start_profile(self._client, self.config.observe, checked))

    def stop_profile(self) -> str:
        """End the profile and write it, a Chrome trace. Returns its path."""
        return self._wait(stop_profile(self._client))

    def effective_parameters(self, rid: str) -> dict[str, Any]:
        """Which parameters a request had, and why each; `rid` is its own, or its answer's `meta_info.id`.

        Of live requests and the last that ended. Raises RequestError code `unknown_rid` for others.
        """

        async def ask() -> dict[str, Any]:
            frontend = self._frontend
            return effective_parameters(frontend.journal, self.config, rid, frontend.ready.max_context)

        return self._wait(ask())

    def get_server_info(self) -> dict[str, Any]:
        """The configuration, the core's facts, and its gauges and counters now."""
        stats = self._wait(self._client.stats())
        return {**self._frontend.describe(), "internal_states": [{**stats.gauges, **stats.counters}]}

    def shutdown(self) -> None:
        """Abort what runs and free everything. May be called twice; called at exit otherwise."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ------------------------------------------------------------------ the loop's thread
    def _submit(self, work: Coroutine[Any, Any, T]) -> Any:
        if not self._close.alive:
            work.close()
            raise RequestError("the engine is shut down", code="engine_closed", status=503)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            result: T = future.result()
        except BaseException:  # such as KeyboardInterrupt here: the request must not go on there
            future.cancel()
            raise
        return result


def _close(client: EngineClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if threading.current_thread() is thread:  # the last reference went there: it can't wait for itself
        threading.Thread(target=_close, args=(client, loop, thread)).start()
        return
    asyncio.run_coroutine_threadsafe(client.close(), loop).result()
    _stop_loop(loop, thread)


async def _cancel_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(_cancel_rest(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _given(named: Mapping[str, Any], fields: Mapping[str, Any]) -> Answer:
    """The arguments of a call as the body of its route."""
    return {name: value for name, value in {**named, **fields}.items() if value is not None}


def _parse(
    prompt: Any,
    sampling_params: Any,
    input_ids: Any,
    stream: bool,
    fields: Mapping[str, Any],
    reasoning: ReasoningFormat | None,
) -> NativeCall:
    named = {"text": prompt, "sampling_params": sampling_params, "input_ids": input_ids, "stream": stream}
    given = {name: value for name, value in named.items() if value is not None}
    unknown = next((name for name in fields if name not in GENERATE_FIELDS or name in named), None)
    if unknown is not None:
        raise RequestError(
            f"generate() has no argument {unknown!r}: check its spelling", code="unknown_field", param=unknown
        )
    return parse_call({**given, **fields}, reasoning)
