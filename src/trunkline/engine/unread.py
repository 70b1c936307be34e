"""Outputs between the core and who takes them, in bounded memory."""

from __future__ import annotations

import asyncio
from collections import deque

from trunkline.messages import TokensOut
from trunkline.types import RequestError

MAX_UNREAD = 65_536  # entries (tokens and alternatives) of one request's output that wait to be taken


class Unread:
    """What one request has said and its reader has not taken. One reader."""

    def __init__(self) -> None:
        self._items: deque[TokensOut | RequestError] = deque()
        self._entries = 0
        self._news = asyncio.Event()

    def put(self, item: TokensOut) -> bool:
        """Returns false when that is too much: nobody seems to read."""
        self._entries += _entries(item)
        self._add(item)
        return self._entries <= MAX_UNREAD

    def fail(self, error: RequestError) -> None:
        """Drop what is there: the reader gets the error next."""
        self._items.clear()
        self._entries = 0
        self._add(error)

    def _add(self, item: TokensOut | RequestError) -> None:
        self._items.append(item)
        self._news.set()

    async def get(self) -> TokensOut | RequestError:
        while not self._items:
            self._news.clear()
            await self._news.wait()
        item = self._items.popleft()
        if isinstance(item, TokensOut):
            self._entries -= _entries(item)
        return item


def _entries(item: TokensOut) -> int:
    count = len(item.token_ids)
    for positions in (item.logprobs, item.prompt_logprobs):
        if positions is not None:
            count += sum(1 + len(at.top) + len(at.chosen) for at in positions)
    return count
