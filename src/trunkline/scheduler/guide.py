"""Where one constrained output stands: in its reasoning, or at a place in its grammar."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import numpy as np

from trunkline.grammar.protocol import MaskRow, Matcher
from trunkline.types import FinishReason, RequestError, Thinking

log = logging.getLogger(__name__)


class Guide:
    """Follows the known output tokens of a request: takes each exactly once, in order. So it survives a
    preemption, after which a request starts from the same known tokens.

    Where the grammar leaves one text, the tokens that the tokenizer makes of it are dictated, although others
    would spell it too. So outputs do not depend on whether dictated tokens are sampled or appended.

    `matcher` None: nothing but a bound on reasoning. While reasoning lasts everything is allowed, except to
    end the output before the grammar was met.
    """

    def __init__(
        self, matcher: Matcher | None, eos_ids: Iterable[int], thinking: Thinking | None = None
    ) -> None:
        self._matcher = matcher
        self._eos_ids = tuple(eos_ids) if matcher is not None else ()
        self._thinking = thinking
        self._thought = 0  # tokens of reasoning so far
        self._end_seen = 0  # how much of `thinking.end_ids` the output ends with
        self._dictated: list[int] | None = None  # what comes next; None: not asked yet

    def follow(self, token_ids: Iterable[int]) -> FinishReason | None:
        """Take known tokens. Returns why the request must end, if it must."""
        try:
            for token_id in token_ids:
                if self._thinking is not None:
                    self._think(self._thinking, token_id)
                elif self._matcher is not None:
                    self._accept(self._matcher, token_id)
        except Exception as error:
            return failure(error)
        return None

    def _accept(self, matcher: Matcher, token_id: int) -> None:
        if not matcher.accept(token_id):
            raise RuntimeError(f"token {token_id} is not what the mask allowed")
        rest = self._dictated[1:] if self._dictated and self._dictated[0] == token_id else []
        self._dictated = rest or None

    def _think(self, thinking: Thinking, token_id: int) -> None:
        self._thought += 1
        end, seen = thinking.end_ids, self._end_seen
        while seen and end[seen] != token_id:  # shorter beginnings of the end that the output may end with
            seen = next(n for n in range(seen - 1, -1, -1) if end[:n] == end[seen - n : seen])
        self._end_seen = seen + 1 if end[seen] == token_id else 0
        if self._end_seen == len(end):
            self._thinking = None

    def forced(self) -> list[int]:
        """Tokens that must come next; still to be followed. [] too where the grammar failed: its next mask
        says why."""
        if self._thinking is not None or self._matcher is None:
            return []
        if self._dictated is None:
            try:
                self._dictated = self._matcher.forced()
            except Exception:
                log.debug("no forced tokens", exc_info=True)
                self._dictated = []
        return self._dictated

    @property
    def asked(self) -> Matcher | None:
        """The matcher whose mask is what may come next, if that takes one."""
        return None if self._thinking is not None or self.forced() else self._matcher

    def fill_mask(self, row: MaskRow, banned: Collection[int]) -> None:
        """Overwrite `row` (`plan.Masks`) with what may come next. `banned` tokens are left out, unless the
        grammar allows nothing else. Raises what the matcher raises."""
        if self._thinking is not None:
            self._fill_thinking(row, self._thinking)
        elif forced := self.forced():
            _only(row, forced[0])
        elif self._matcher is not None:
            self._matcher.fill_mask(row)
        else:
            row.fill(-1)
        if banned:
            kept = _without(row, banned)
            if kept.any():
                row[:] = kept

    def _fill_thinking(self, row: MaskRow, thinking: Thinking) -> None:
        if thinking.max_tokens is not None and self._thought >= thinking.max_tokens:
            _only(row, thinking.end_ids[self._end_seen])
        else:
            row.fill(-1)
            row[:] = _without(row, self._eos_ids)


def _only(row: MaskRow, token_id: int) -> None:
    row.fill(0)
    row.view(np.uint32)[token_id >> 5] = 1 << (token_id & 31)


def _without(row: MaskRow, token_ids: Iterable[int]) -> MaskRow:
    kept = row.copy()
    words = kept.view(np.uint32)
    for token_id in token_ids:
        words[token_id >> 5] &= np.uint32(~(1 << (token_id & 31)) & 0xFFFFFFFF)
    return kept


def failure(error: Exception) -> FinishReason:
    """Why a request ends whose grammar failed: the client's doing, or a fault of ours that is logged."""
    if isinstance(error, RequestError):
        return FinishReason(
            "abort",
            message=error.message,
            code=error.code,
            status=error.status,
            param=error.param,
            pointer=getattr(error, "pointer", None),
        )
    log.error("a grammar failed", exc_info=error)
    return FinishReason(
        "abort", message="the grammar of this request failed", code="grammar_failed", status=500
    )
