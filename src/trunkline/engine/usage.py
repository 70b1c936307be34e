"""Token counts of a call, added up from its chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.engine.frontend import Chunk


class Usage:
    """A prompt counts once, whatever the number `n` of its completions; what its first completion found in
    the cache counts as cached."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._cached: dict[int, int] = {}  # by prompt
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._forced: dict[int, int] = {}  # by completion
        self.prefix_miss: dict[str, Any] | None = None  # of the first prompt, when asked for
        self._reasoning: dict[int, int] = {}

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached.values())

    @property
    def forced_tokens(self) -> int:
        """Of the completion tokens: those that a grammar dictated."""
        return sum(self._forced.values())

    def has_prompt(self, position: int) -> bool:
        """Whether anything has come of a prompt."""
        return position in self._cached

    def cached_of(self, position: int) -> int:
        return self._cached.get(position, 0)

    @property
    def reasoning_tokens(self) -> int | None:
        """Of the completion tokens; None where nobody looked for reasoning."""
        return sum(self._reasoning.values()) if self._reasoning else None

    def add(self, chunk: Chunk) -> None:
        prompt, completion = divmod(chunk.index, self._n)
        if prompt not in self._cached:
            self._cached[prompt] = 0
            self.prompt_tokens += chunk.prompt_tokens
        if completion == 0:
            self._cached[prompt] = chunk.cached_tokens
        self.completion_tokens += len(chunk.token_ids)
        if chunk.prefix_miss is not None and prompt == 0:
            self.prefix_miss = chunk.prefix_miss
        if chunk.forced_tokens:
            self._forced[chunk.index] = chunk.forced_tokens
        if chunk.reasoning_tokens is not None:
            self._reasoning[chunk.index] = chunk.reasoning_tokens
