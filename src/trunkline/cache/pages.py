"""The pool of KV page ids."""

from __future__ import annotations


class PagePool:
    """Hands out page ids `0 .. num_pages - 1`. A page is free or has exactly one owner: a lease or the tree.

    Last freed, first reused: a small working set stays warm in the caches of the machine.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return `count` page ids. The caller has made sure that so many are free."""
        if count == 0:
            return []
        if count > len(self._free):
            raise IndexError(f"{count} pages wanted, {len(self._free)} free")
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def give(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))

    def free_ids(self) -> list[int]:
        return list(self._free)
