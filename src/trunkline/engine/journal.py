"""What happens to calls, for those who look at them: logs, metrics, traces, dumps, curious users.

A call is one request to a route or to `Engine`: one or several prompts, each with `n` completions. Its record
is written here and nowhere else; observers are told and only read.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trunkline.engine.usage import Usage
from trunkline.types import FinishReason, RequestError, SamplingParams, Timing

if TYPE_CHECKING:
    from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared

KEPT_CALLS = 2048  # finished ones that can be asked about
KEPT_BYTES = 64 * 2**20  # that all of them may take, about


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a call came from. `body`: as it was sent. `names`: of parameters, engine -> route. `defaults`:
    sampling parameters of the model's generation_config.json. `headers`: trace context of the caller."""

    route: str = "Engine"
    request_id: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    size: int = 0  # bytes of the body, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What was in force for one prompt, without the prompt itself."""

    rid: str
    num_tokens: int
    asked: SamplingParams
    used: SamplingParams
    given: frozenset[str]  # the parameters that the body had
    clips_output: bool
    logprobs: dict[str, Any] | None
    grammar: str | None  # its kind
    priority: int | None
    salted: bool
    max_thinking: int | None


@dataclass(eq=False, slots=True)
class Completion:
    """One output so far. Times are on the monotonic clock."""

    prompt: int
    num_tokens: int = 0
    cached_tokens: int = 0
    forced_tokens: int = 0
    retractions: int = 0
    first_token: float | None = None
    last_token: float = 0.0
    ended: float | None = None
    finish: FinishReason | None = None
    timing: Timing | None = None
    prefix_miss: dict[str, Any] | None = None
    detokenize: float = 0.0  # seconds, of calls that are traced
    digest: int = 0  # CRC-32 of its token ids in decimal, each with a comma behind it
    text: list[str] = field(default_factory=list)  # while it runs, on demand


@dataclass(eq=False)
class Record:
    """One call from its arrival to its end. `traced`: step times are asked of the core."""

    origin: Origin
    received: float  # Unix time
    started: float  # monotonic clock
    traced: bool = False
    keeps_text: bool = False
    prompts: list[Prompt] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(1))
    ended: float | None = None
    error: RequestError | None = None
    texts: list[str | list[int]] = field(default_factory=list)  # the prompts, while they are kept

    @property
    def status(self) -> int:
        """HTTP status of its end; 0 while it runs, 499 when the client left."""
        if self.error is not None:
            return self.error.status
        if self.ended is None:
            return 0
        return 200 if all(one.finish is not None for one in self.completions) else 499

    @property
    def key(self) -> str:
        return self.prompts[0].rid if self.prompts else self.origin.request_id

    def size(self) -> int:
        """Bytes of what is kept of it, about."""
        return self.origin.size + 512 * (1 + len(self.prompts) + len(self.completions))


class Observer(Protocol):
    """Is told of every call. Must be quick, must not raise, and changes nothing of the record."""

    def begun(self, record: Record) -> None: ...

    def news(self, record: Record, completion: Completion, chunk: Chunk, now: float) -> None:
        """`completion` has the chunk already; `first_token` and `last_token` are as before it."""
        ...

    def over(self, record: Record) -> None: ...


class Journal:
    """Records of all live calls, and of the last ones that ended. One per frontend, on its event loop."""

    def __init__(self, keep: int = KEPT_CALLS) -> None:
        self.observers: tuple[Observer, ...] = ()
        self.keeps_texts = False  # outputs are collected while their calls run
        # What is left of the bodies of ended calls, if anything.
        self.keeps_bodies: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
        self.trace = False  # ask the core for step times
        self._keep = keep
        self._live: dict[str, Record] = {}  # by each of their prompts' ids
        self._ended: OrderedDict[int, Record] = OrderedDict()
        self._names: dict[str, Record] = {}  # of ended ones: each of their ids, and the request's
        self._bytes = 0
        self._serial = 0

    def begin(self, origin: Origin) -> Record:
        """A call has arrived. It must reach `watch`, or `refused`."""
        return Record(origin, time.time(), time.monotonic(), self.trace, self.keeps_texts)

    def refused(self, record: Record, error: RequestError) -> None:
        """A call ended before it ran, or its end is known better than `watch` could."""
        record.error = _bare(error)
        if record.ended is None:
            self._end(record)

    def find(self, name: str) -> Record | None:
        """The call that has this id: of a prompt, or of its HTTP request when it has ended."""
        return self._live.get(name) or self._names.get(name)

    def live(self) -> list[Record]:
        return list(dict.fromkeys(self._live.values()))

    def ended(self) -> list[Record]:
        """The oldest first."""
        return list(self._ended.values())

    async def watch(
        self, record: Record, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Chunk, None]:
        """Pass the chunks of a call on, writing its record."""
        self._run(record, batch)
        observers = self.observers
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    now = time.monotonic()
                    completion = record.completions[chunk.index]
                    record.usage.add(chunk)
                    _note(record, completion, chunk, now)
                    for observer in observers:
                        observer.news(record, completion, chunk, now)
                    if chunk.token_ids:
                        completion.last_token = now
                        if completion.first_token is None:
                            completion.first_token = now
                    yield chunk
        except RequestError as error:
            record.error = _bare(error)
            raise
        except Exception:
            record.error = RequestError("internal error", code="internal_error", status=500)
            raise
        finally:
            self._end(record)

    def _run(self, record: Record, batch: Sequence[Prepared]) -> None:
        record.prompts = [_prompt(prepared, record.origin, i) for i, prepared in enumerate(batch)]
        record.usage = Usage(batch[0].params.n)
        record.completions = [
            Completion(position) for position, prepared in enumerate(batch) for _ in range(prepared.params.n)
        ]
        record.texts = [prepared.request.prompt for prepared in batch]
        for prompt in record.prompts:
            self._live.setdefault(prompt.rid, record)  # a duplicate id is refused behind this
        for observer in self.observers:
            observer.begun(record)

    def _end(self, record: Record) -> None:
        record.ended = time.monotonic()
        for prompt in record.prompts:
            if self._live.get(prompt.rid) is record:
                del self._live[prompt.rid]
        for observer in self.observers:
            observer.over(record)
        kept = {} if self.keeps_bodies is None else self.keeps_bodies(record.origin.body)
        record.origin = dataclasses.replace(record.origin, body=kept, size=record.origin.size if kept else 0)
        record.texts.clear()
        for completion in record.completions:
            completion.text.clear()
        self._serial += 1
        self._ended[self._serial] = record
        self._bytes += record.size()
        for name in self._names_of(record):
            self._names[name] = record
        while len(self._ended) > self._keep or self._bytes > KEPT_BYTES:
            _, oldest = self._ended.popitem(last=False)
            self._bytes -= oldest.size()
            for name in self._names_of(oldest):
                if self._names.get(name) is oldest:
                    del self._names[name]

    @staticmethod
    def _names_of(record: Record) -> list[str]:
        names = [prompt.rid for prompt in record.prompts]
        return [*names, record.origin.request_id] if record.origin.request_id else names


def _bare(error: RequestError) -> RequestError:
    """What it says, without its traceback: the frames of that hold the whole request."""
    return RequestError(
        error.message, code=error.code, param=error.param, status=error.status, retry_after=error.retry_after
    )


def _note(record: Record, completion: Completion, chunk: Chunk, now: float) -> None:
    completion.num_tokens += len(chunk.token_ids)
    completion.cached_tokens = chunk.cached_tokens
    completion.forced_tokens = chunk.forced_tokens
    completion.retractions = chunk.retractions
    if chunk.timing is not None:
        completion.timing, completion.prefix_miss = chunk.timing, chunk.prefix_miss
    if chunk.finish is not None:
        completion.finish, completion.ended = chunk.finish, now
        completion.detokenize = chunk.detokenize
    for token in chunk.token_ids:
        completion.digest = zlib.crc32(b"%d," % token, completion.digest)
    if record.keeps_text:
        completion.text.append(chunk.text)


def _is_given(body: Mapping[str, Any], path: str, position: int) -> bool:
    """Whether a body has a value at a dotted path; a list on the way has one entry per prompt."""
    at: Any = body
    for name in path.split("."):
        if isinstance(at, list):
            at = at[position] if position < len(at) else None
        at = at.get(name) if isinstance(at, Mapping) else None
    return at is not None


def _prompt(prepared: Prepared, origin: Origin, position: int) -> Prompt:
    request: GenerationRequest = prepared.request
    wanted = request.logprobs
    return Prompt(
        rid=request.rid,
        num_tokens=len(prepared.token_ids),
        asked=request.params,
        used=prepared.params,
        given=frozenset(
            name
            for name in SamplingParams.__struct_fields__
            if _is_given(origin.body, origin.names.get(name, name), position)
        ),
        clips_output=request.clip_output,
        logprobs=None
        if wanted is None
        else {"prompt_start": wanted.prompt_start, "top": wanted.top_n, "token_ids": list(wanted.token_ids)},
        grammar=None if request.constraint is None else request.constraint.spec.kind,
        priority=request.priority,
        salted=bool(request.cache_salt),
        max_thinking=request.max_thinking_tokens,
    )
