"""A grammar of integers whose masks can be checked: what may follow is a function of all that came before.

Where a hash says so the next few tokens are dictated, one after the other; now and then the output may end,
and after enough tokens it must. Nothing is kept but the tokens, so the naive reference asks the same question
afresh at each token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from tests.sim.integers import EOS_IDS, NUM_SAMPLED, mix
from trunkline.grammar.protocol import Grammar, GrammarError, MaskRow, Matcher
from trunkline.messages import AddRequest
from trunkline.types import GrammarSpec

BAD = "bad"  # a grammar that does not compile
BREAKS = "breaks"  # one whose mask gives up after a few tokens


def allowed(source: str, tokens: Sequence[int]) -> frozenset[int]:
    """What may follow `tokens` in the grammar `source`. Never empty."""
    state = sum(map(ord, source))
    for token in tokens:
        state = mix(state * 31 + token)
    if len(tokens) >= 4 + state % 40:
        return frozenset(EOS_IDS)
    forced = _dictated(source, tokens)
    if forced is not None:
        return frozenset((forced,))
    chosen = {2 + mix(state + i) % (NUM_SAMPLED - 2) for i in range(1 + state % 6)}
    return frozenset(chosen | set(EOS_IDS if state % 11 == 0 else ()))


def _dictated(source: str, tokens: Sequence[int]) -> int | None:
    """Spans of one to five tokens begin at places that the text before them decides."""
    for back in range(min(5, len(tokens) + 1)):
        at = len(tokens) - back
        state = mix(sum(map(ord, source)) + sum(tokens[max(0, at - 2) : at]) * 7 + at)
        if state % 5 == 0 and back < 1 + (state >> 8) % 5:
            return 2 + mix(state + back) % (NUM_SAMPLED - 2)
    return None


def spelled(source: str, tokens: Sequence[int]) -> frozenset[int]:
    """`allowed`, and where that is dictated, a token that would spell the same text another way: masks and
    matchers allow it too, outputs must not have it."""
    found = allowed(source, tokens)
    return found | {23 if 23 not in found else 22} if len(found) == 1 else found


@dataclass(slots=True)
class ToyMatcher:
    """`asked`: how often masks were filled and tokens dictated, for coverage."""

    source: str
    asked: Counter[str]
    tokens: list[int] = field(default_factory=list)

    def fill_mask(self, row: MaskRow) -> None:
        if self.source == BREAKS and len(self.tokens) > 3:
            raise GrammarError("too much work", code="grammar_too_complex")
        row.fill(0)
        for token in spelled(self.source, self.tokens):
            row.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))
        self.asked["masks"] += 1

    def prepare(self, matchers: Sequence[Matcher]) -> None:
        self.asked["prepared"] += len(matchers)

    def accept(self, token_id: int) -> bool:
        good = token_id in spelled(self.source, self.tokens)
        if good:
            self.tokens.append(token_id)
        return good

    def rollback(self, count: int) -> None:
        if count > len(self.tokens):
            raise ValueError(f"{count} of {len(self.tokens)} tokens")
        del self.tokens[len(self.tokens) - count :]

    def forced(self) -> list[int]:
        found: list[int] = []
        while len(choices := allowed(self.source, self.tokens + found)) == 1:
            found += choices
        return found

    def fork(self) -> ToyMatcher:
        return ToyMatcher(self.source, self.asked, list(self.tokens))

    @property
    def finished(self) -> bool:
        return allowed(self.source, self.tokens) <= frozenset(EOS_IDS)


@dataclass(frozen=True)
class ToyGrammar:
    source: str
    asked: Counter[str]
    num_bytes: int = 0

    def matcher(self) -> ToyMatcher:
        return ToyMatcher(self.source, self.asked)


@dataclass
class ToyCompiler:
    """Compilations end when the simulation says so; with `patience` 0, at once."""

    patience: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    known: dict[GrammarSpec, Future[Grammar]] = field(default_factory=dict)
    waiting: list[tuple[int, GrammarSpec, Future[Grammar]]] = field(default_factory=list)

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        if spec in self.known and self.patience < 6:
            return self.known[spec]
        future = self.known[spec] = Future()
        steps = mix(len(self.waiting) + sum(map(ord, spec.source))) % (self.patience + 1)
        self.waiting.append((steps, spec, future))
        if not steps:
            self.tick()
        return future

    def tick(self) -> None:
        """A step has passed."""
        due = [entry for entry in self.waiting if entry[0] <= 0]
        self.waiting = [(steps - 1, spec, future) for steps, spec, future in self.waiting if steps > 0]
        for _, spec, future in due:
            if spec.source == BAD:
                future.set_exception(GrammarError("no grammar", code="invalid_grammar", param="grammar"))
            else:
                future.set_result(ToyGrammar(spec.source, self.asked))

    def close(self) -> None:
        pass


def choices(message: AddRequest, out: Sequence[int]) -> frozenset[int] | None:
    """What may follow the output `out`, found afresh from the whole of it; None: anything."""
    rest: Sequence[int] | None = out
    everything = frozenset(range(NUM_SAMPLED))
    found: frozenset[int] | None = None
    if message.thinking is not None:
        end, most = list(message.thinking.end_ids), message.thinking.max_tokens
        ends = [i for i in range(len(end), len(out) + 1) if list(out[i - len(end) : i]) == end]
        rest = out[ends[0] :] if ends else None
        if rest is None and most is not None and len(out) >= most:
            seen = max(n for n in range(len(end)) if n == 0 or list(out[-n:]) == end[:n])
            found = frozenset((end[seen],))
        elif rest is None and message.grammar is not None:
            found = everything - frozenset(EOS_IDS)
    if rest is not None and message.grammar is not None:
        found = allowed(message.grammar.source, rest)
    if found is not None and len(out) < message.params.min_new_tokens:
        found = found - frozenset(EOS_IDS + message.params.stop_token_ids) or found
    return found
