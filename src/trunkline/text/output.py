"""The text of one output: tokens in, text out, up to the stop string or stop token that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from trunkline.text.detokenizer import Detokenizer, Vocabulary
from trunkline.text.reasoning import ReasoningMeter
from trunkline.text.stop import StopMatcher
from trunkline.types import FinishReason, SamplingParams


class OutputText:
    """Feeds each token to the detokeniser and the stop matcher, so that text, token count and finish reason
    do not depend on how many tokens came in one message."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        params: SamplingParams,
        *,
        shown: frozenset[int] = frozenset(),
        meter: ReasoningMeter | None = None,
    ) -> None:
        """`shown`: special tokens that are text here. `meter` is told the text of each token."""
        self._detokenizer = Detokenizer(
            vocabulary,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            shown=shown,
        )
        self._stops = StopMatcher(params.stop, params.stop_regex, keep_match=params.no_stop_trim)
        self._params = params
        self._meter = meter
        self.num_tokens = 0

    def feed(
        self, token_ids: Sequence[int], finish: FinishReason | None
    ) -> tuple[str, int, FinishReason | None]:
        """New text, how many of `token_ids` belong to the output (those behind a stop string do not), and why
        the output ended, if it did. `finish` is the engine's reason, which holds after the last token."""
        parts = []
        trims_last = finish is not None and isinstance(finish.matched, int) and not self._params.no_stop_trim
        for used, token_id in enumerate(token_ids, 1):
            self.num_tokens += 1
            piece = ""
            if not (trims_last and used == len(token_ids)):
                piece = self._detokenizer.feed(token_id)
                parts.append(self._accept(piece))
            if self._meter is not None:
                self._meter.feed(piece)
            if self._stops.matched is not None:
                return "".join(parts), used, FinishReason("stop", matched=self._stops.matched)
        if finish is not None:
            parts.append(self._accept(self._detokenizer.flush()))
            if self._stops.matched is not None:
                finish = FinishReason("stop", matched=self._stops.matched)
            parts.append(self._stops.flush())
        return "".join(parts), len(token_ids), finish

    def _accept(self, text: str) -> str:
        # Below min_new_tokens a stop string does not end the output, as a stop token does not.
        return text if self.num_tokens < self._params.min_new_tokens else self._stops.feed(text)
