"""API speculation: endpoints that bill by call are asked once for text that several `gen`s then take from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from trunkline.lang.backends.backend import Backend, Prompt
from trunkline.lang.ir import Expr, Fill, Gen, Sampling
from trunkline.types import RequestError

CHAT_TRIES = 3  # calls of an assistant's turn until one follows the program's text


@dataclass
class Speculation:
    """Text that was generated ahead, past the stop strings of the `gen` that asked for it."""

    num_tokens: int
    ahead: str = ""

    def fill(self, text: str) -> None:
        """The program says `text`: what was generated ahead stays good only if it says the same."""
        self.ahead = self.ahead[len(text) :] if self.ahead.startswith(text) else ""

    async def take(self, backend: Backend, prompt: Prompt, sampling: Sampling) -> tuple[str, dict[str, Any]]:
        """The value of a `gen` and the meta data of the call, empty when none was needed."""
        meta: dict[str, Any] = {}
        limit = sampling.max_new_tokens or self.num_tokens
        if not self.ahead or (not sampling.stops and len(self.ahead) < limit):
            most = max(limit, self.num_tokens)
            self.ahead, meta = await complete(
                backend, prompt, replace(sampling, max_new_tokens=most, stop=None)
            )
        found = [at for stop in sampling.stops if (at := self.ahead.find(stop)) >= 0]
        end = min(found, default=limit)  # without a stop string, tokens are counted as characters
        value, self.ahead = self.ahead[:end], self.ahead[end:]
        return value, meta


async def complete(backend: Backend, prompt: Prompt, sampling: Sampling) -> tuple[str, dict[str, Any]]:
    """One whole completion."""
    async with aclosing(backend.generate(prompt, sampling, stream=False)) as pieces:
        piece, meta = await anext(pieces)
    if not isinstance(piece, str):
        raise RequestError("n must be 1 with num_api_spec_tokens", code="invalid_value", param="n")
    return piece, meta


async def complete_turn(
    backend: Backend, prompt: Prompt, parts: Sequence[Expr], sampling: Sampling, num_tokens: int
) -> tuple[list[str], dict[str, Any]]:
    """The values of all `gen`s of an assistant's turn, from one call whose text follows the turn's own text.

    Raises RequestError if it does not after some tries.
    """
    limits = [part.sampling.max_new_tokens or num_tokens for part in parts if isinstance(part, Gen)]
    sampling = replace(sampling, max_new_tokens=max(sum(limits), num_tokens), stop=None)
    for _ in range(CHAT_TRIES):
        text, meta = await complete(backend, prompt, sampling)
        values = match_turn(parts, text)
        if values is not None:
            return values, meta
    raise RequestError(
        f"the model's turn does not follow the program's text after {CHAT_TRIES} calls; the last one gave "
        f"{text[:200]!r}",
        code="speculation_failed",
        status=502,
    )


def match_turn(parts: Sequence[Expr], text: str) -> list[str] | None:
    """The values that the `gen`s among `parts` have in `text`; None when its constant text isn't there."""
    values: list[str] = []
    at, waiting = 0, False
    for part in parts:
        if isinstance(part, Gen):
            waiting = True
            values.append("")
            continue
        assert isinstance(part, Fill)
        wanted = part.text if values else part.text.lstrip()
        found = text.find(wanted, at)
        if found < 0 or (found > at and not waiting):
            return None
        if waiting:
            values[-1] = text[at:found]
        at, waiting = found + len(wanted), False
    if waiting:
        stops = next(part for part in reversed(parts) if isinstance(part, Gen)).sampling.stops
        rest = text[at:]
        values[-1] = rest[: min((i for stop in stops if (i := rest.find(stop)) >= 0), default=len(rest))]
    return values
