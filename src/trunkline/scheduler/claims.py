"""Which prompt prefixes are being computed right now, so that no request computes one a second time.

A running request claims the blocks of its prompt and drops each claim when the block is published. A waiting
request whose next block is claimed by another waits for it. Blocks are named by a chained 64-bit hash; a
collision costs a needless wait, never a wrong result.
"""

from __future__ import annotations

from trunkline.types import CacheKey

MIN_BLOCK = 16  # tokens; sharing less than this is not worth waiting for


class PrefixClaims:
    """Claims of running requests. `block` is in tokens, a multiple of the page size."""

    def __init__(self, page_size: int) -> None:
        self.block = -(-MIN_BLOCK // page_size) * page_size
        self._holder: dict[int, str] = {}  # fingerprint -> rid
        self._held: dict[
            str, list[tuple[int, int]]
        ] = {}  # rid -> (block index, fingerprint), last block first

    def fingerprints(self, key: CacheKey, tokens: list[int]) -> list[int]:
        """One chained hash per whole block of `tokens`."""
        found, chain = [], hash(key)
        for end in range(self.block, len(tokens) + 1, self.block):
            chain = hash((chain, *tokens[end - self.block : end]))
            found.append(chain)
        return found

    def claim(self, rid: str, fingerprints: list[int], computed: int) -> None:
        """Claim the blocks past the first `computed` tokens that nobody claims yet."""
        first = computed // self.block
        fresh = [(i, name) for i, name in enumerate(fingerprints) if i >= first and name not in self._holder]
        if fresh:
            self._holder.update((name, rid) for _, name in fresh)
            self._held[rid] = fresh[::-1]

    def awaited(self, fingerprints: list[int], computed: int, limit: int) -> int | None:
        """The claimed block at token `computed`, if there is one and it lies within `tokens[:limit]`."""
        index = computed // self.block
        if index >= len(fingerprints) or (index + 1) * self.block > limit:
            return None
        return fingerprints[index] if fingerprints[index] in self._holder else None

    def is_claimed(self, fingerprint: int | None) -> bool:
        return fingerprint in self._holder

    def published(self, rid: str, num_tokens: int) -> None:
        """Drop the claims on blocks that lie within the first `num_tokens` tokens."""
        held = self._held.get(rid)
        if held is None:
            return
        while held and (held[-1][0] + 1) * self.block <= num_tokens:
            del self._holder[held.pop()[1]]
        if not held:
            del self._held[rid]

    def drop(self, rid: str) -> None:
        """The request left its row: its claims end."""
        for _, name in self._held.pop(rid, ()):
            del self._holder[name]

    @property
    def num_claims(self) -> int:
        return len(self._holder)
