"""Token counts of a call, added up from its chunks."""

from __future__ import annotations

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

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached.values())

    @property
    def forced_tokens(self) -> int:
        """Of the completion tokens: those that a grammar dictated."""
        return sum(self._forced.values())

    def add(self, chunk: Chunk) -> None:
        prompt, completion = divmod(chunk.index, self._n)
        if prompt not in self._cached:
            self._cached[prompt] = 0
            self.prompt_tokens += chunk.prompt_tokens
        if completion == 0:
            self._cached[prompt] = chunk.cached_tokens
        self.completion_tokens += len(chunk.token_ids)
        self._forced[chunk.index] = chunk.forced_tokens
