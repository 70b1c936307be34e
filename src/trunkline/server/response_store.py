"""Responses that can be asked for again: in memory, the oldest unused ones leave first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

Json = dict[str, Any]


@dataclass
class Stored:
    """A response as it is now. `items`: its own input; `messages`: the whole conversation before its output,
    for what continues it."""

    response: Json
    items: list[Json]
    messages: list[Json]
    size: int = field(default=0)


class ResponseStore:
    """At most `most` responses and `most_bytes` bytes of JSON. 0 of either: nothing is kept."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._entries: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    @property
    def enabled(self) -> bool:
        return self._most > 0 and self._most_bytes > 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def put(self, entry: Stored) -> None:
        """Keep a response, or its newer state. One that alone is too large is not kept."""
        self.delete(entry.response["id"])
        entry.size = len(msgspec.json.encode([entry.response, entry.items, entry.messages]))
        self._entries[entry.response["id"]] = entry
        self._bytes += entry.size
        while len(self._entries) > self._most or self._bytes > self._most_bytes:
            self.delete(next(iter(self._entries)))

    def get(self, key: str) -> Stored | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def delete(self, key: str) -> bool:
        entry = self._entries.pop(key, None)
        self._bytes -= 0 if entry is None else entry.size
        return entry is not None

    def find_item(self, key: str) -> Json | None:
        """An item of some response's output or input, by its id."""
        for entry in reversed(list(self._entries.values())):
            items: list[Json] = [*entry.response["output"], *entry.items]
            for item in items:
                if item.get("id") == key:
                    return item
        return None
