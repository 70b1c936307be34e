"""Sessions: token sequences kept here, which requests go on from, so that a client sends only what is new.

The requests of a session form a tree: each begins with a part of another one's tokens, or anew. Field names
and their meaning are SGLang's. Token ids live here, with the text side; the core is told the turn of a
request, so that its prefix tree keeps the session's pages as long as there is room, and finds them at once.

Everything runs on the frontend's event loop.
"""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trunkline.types import RequestError, SessionTurn

MAX_TURNS = 16_384  # requests that one session remembers


@dataclass(frozen=True, kw_only=True)
class SessionRef:
    """Where in a session a request goes on.

    `rid`: the request whose prompt and output it continues; None: a new beginning, except with `latest` and
    in streaming sessions, where it is the one that finished last. `offset` cuts that sequence as a slice
    `[:offset]` does (0 or None: all of it). `replace` drops what else followed `rid`, or the whole tree when
    there is no `rid`. `drop_output` continues its prompt alone.
    """

    id: str
    rid: str | None = None
    offset: int | None = None
    replace: bool = False
    drop_output: bool = False
    latest: bool = False

    def param(self, name: str) -> str:
        """The request's field that says `name` of it."""
        return "session_id" if self.latest else f"session_params.{name}"


@dataclass(eq=False, slots=True)
class _Node:
    """One completion: the first `kept` tokens of its parent's sequence, then its own."""

    rid: str
    number: int  # its turn, to the core
    parent: _Node | None
    kept: int
    prompt: array[int]
    output: array[int] = field(default_factory=lambda: array("i"))
    children: list[_Node] = field(default_factory=list)
    finished: bool = False

    @property
    def prompt_length(self) -> int:
        return self.kept + len(self.prompt)

    @property
    def length(self) -> int:
        return self.prompt_length + len(self.output)

    def tokens(self, length: int) -> list[int]:
        """The first `length` tokens of its sequence."""
        parts: list[array[int]] = []
        node: _Node | None = self
        while node is not None and length > 0:
            if length > node.kept:
                parts.append((node.prompt + node.output)[: length - node.kept])
                length = node.kept
            node = node.parent
        return [token for part in reversed(parts) for token in part]


@dataclass(eq=False, slots=True)
class _Session:
    id: str
    key: str  # what the core knows it by: unlike `id` it is never used twice
    capacity: int
    streaming: bool
    timeout: float
    nodes: dict[str, _Node] = field(default_factory=dict)
    salt: str | None = None  # of its first request: whose caches are separate sees nothing of it
    latest: _Node | None = None
    turns: int = 0  # so far
    stored: int = 0  # tokens
    running: int = 0
    last_use: float = 0.0
    timer: asyncio.TimerHandle | None = None


class Turn:
    """One request in a session, from its checks to its end: `begin`, `extend`, `end`."""

    def __init__(
        self, sessions: Sessions, session: _Session, ref: SessionRef, parent: _Node | None, kept: int
    ) -> None:
        self.prefix = [] if parent is None else parent.tokens(kept)
        self._sessions = sessions
        self._session = session
        self._ref = ref
        self._parent = parent
        self._kept = kept
        self._nodes: list[_Node] = []

    def begin(self, rids: Sequence[str], prompt: Sequence[int], salt: str) -> list[str]:
        """Enter the request, one node for each of `rids`; `prompt` is what is new. Returns the ids of running
        requests that it replaces, which are to be aborted. Raises RequestError."""
        session, ref = self._session, self._ref
        self._sessions.check_unchanged(session, ref, self._parent)
        anew = ref.replace and self._parent is None
        taken = next((rid for rid in rids if rid in session.nodes), None)
        if taken is not None and not anew:
            raise RequestError(
                f"session {session.id!r} has a request {taken!r} already: ids are unique in a session",
                code="duplicate_rid",
                param="rid",
            )
        self._sessions.check_room(session, len(prompt) * len(rids), len(rids))
        replaced = self._clear() if ref.replace else []
        session.salt = salt
        session.running += 1
        for rid in rids:
            session.turns += 1
            node = _Node(rid, session.turns, self._parent, self._kept, array("i", prompt))
            session.nodes[rid] = node
            if self._parent is not None:
                self._parent.children.append(node)
            self._nodes.append(node)
            self._sessions.count(session, len(prompt))
        return replaced

    def of(self, index: int) -> SessionTurn:
        """What the core is told of the completion with this index."""
        follows = 0 if self._parent is None else self._parent.number
        return SessionTurn(self._session.key, self._nodes[index].number, follows, self._kept)

    def _clear(self) -> list[str]:
        """Forget what follows the parent, or the whole tree."""
        session, parent = self._session, self._parent
        below = list(session.nodes.values())
        running = []
        if parent is not None:
            below = parent.children.copy()
            running = [] if parent.finished else [parent.rid]
            for node in below:
                below += node.children
            parent.children.clear()
        for node in below:
            running += [] if node.finished else [node.rid]
            self._sessions.remove(session, node)
        session.latest = parent
        return running

    def extend(self, index: int, token_ids: Sequence[int], finished: bool) -> None:
        """New output of the completion with this index."""
        node = self._nodes[index]
        node.output.extend(token_ids)
        node.finished = finished
        if self._session.nodes.get(node.rid) is node:
            self._sessions.count(self._session, len(token_ids))
            if finished:
                self._session.latest = node

    def end(self) -> None:
        """Completions that did not finish leave nothing behind."""
        session = self._session
        session.running -= 1 if self._nodes else 0
        for node in self._nodes:
            if not node.finished and session.nodes.get(node.rid) is node:
                self._sessions.remove(session, node)
                if node.parent is not None:
                    node.parent.children.remove(node)
        self._nodes = []
        session.last_use = asyncio.get_running_loop().time()


class Sessions:
    """All sessions of a frontend, at most `most` with `most_tokens` tokens together; one that is not used for
    its timeout is closed. `forget` is called with the key of each that closes."""

    def __init__(self, most: int, most_tokens: int, timeout: float, forget: Callable[[str], None]) -> None:
        self._most = most
        self._most_tokens = most_tokens
        self._timeout = timeout
        self._forget = forget
        self._open: dict[str, _Session] = {}
        self._stored = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_tokens(self) -> int:
        """Tokens stored for all of them."""
        return self._stored

    def open(
        self,
        capacity_of_str_len: int = 0,
        session_id: str | None = None,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Returns the session's id. `capacity_of_str_len`: most tokens it may store; 0: what the server has.
        `timeout`: seconds without use, up to the server's own. Raises RequestError."""
        if session_id is not None and session_id in self._open:
            raise RequestError(
                f"session {session_id!r} is open already", code="session_exists", param="session_id"
            )
        if len(self._open) >= self._most:
            raise RequestError(
                f"{len(self._open)} sessions are open, the limit is {self._most}: close some "
                "(--max-sessions raises it)",
                code="too_many_sessions",
                status=429,
            )
        found = session_id or uuid.uuid4().hex
        seconds = self._timeout if timeout is None else min(timeout, self._timeout)
        session = _Session(
            found, uuid.uuid4().hex, capacity_of_str_len or self._most_tokens, streaming, seconds
        )
        loop = asyncio.get_running_loop()
        session.last_use = loop.time()
        session.timer = loop.call_later(seconds, self._expire, session)
        self._open[found] = session
        return found

    def close(self, session_id: str) -> None:
        """Forget a session; its running requests go on. Raises RequestError for an unknown one."""
        session = self._open.get(session_id)
        if session is None:
            raise _unknown(session_id, "session_id")
        self._drop(session)

    def find(self, ref: SessionRef, salt: str) -> Turn:
        """The place that a request goes on from. Raises RequestError; a session of another cache salt is as
        unknown as one that was never opened."""
        session = self._open.get(ref.id)
        if session is None or session.salt not in (None, salt):
            raise _unknown(ref.id, ref.param("id"))
        if session.streaming and (ref.replace or ref.drop_output or ref.offset):
            raise RequestError(
                "a streaming session is only appended to: replace, offset and drop_previous_output need "
                "one that is opened without streaming",
                code="invalid_value",
                param="session_params",
            )
        parent = self._parent(session, ref)
        if parent is None:
            return Turn(self, session, ref, None, 0)
        length = parent.prompt_length if ref.drop_output else parent.length
        if ref.offset and abs(ref.offset) > length:
            raise RequestError(
                f"session_params.offset is {ref.offset}; request {parent.rid!r} has {length} tokens",
                code="out_of_range",
                param="session_params.offset",
            )
        kept = length if not ref.offset else ref.offset if ref.offset > 0 else length + ref.offset
        return Turn(self, session, ref, parent, kept)

    @staticmethod
    def _parent(session: _Session, ref: SessionRef) -> _Node | None:
        if session.streaming and session.running:
            raise _busy(session, ref, "another request")
        if ref.rid is None:
            return session.latest if session.streaming or ref.latest else None
        found = session.nodes.get(ref.rid)
        if found is None or (session.streaming and found is not session.latest):
            what = "no request" if found is None else "not at its end the request"
            raise RequestError(
                f"session {session.id!r} has {what} {ref.rid!r}",
                code="unknown_session_rid",
                param=ref.param("rid"),
            )
        if not found.finished and not ref.replace:
            raise _busy(session, ref, f"request {found.rid!r}")
        return found

    # ------------------------------------------------------------------ for turns
    def check_unchanged(self, session: _Session, ref: SessionRef, parent: _Node | None) -> None:
        """Raises RequestError when what `find` gave does not hold any more: other requests came between."""
        if self._open.get(session.id) is not session:
            raise _unknown(session.id, ref.param("id"))
        if self._parent(session, ref) is not parent:
            raise _busy(session, ref, "another request")

    def check_room(self, session: _Session, tokens: int, turns: int) -> None:
        """Raises RequestError when a prompt does not fit. Outputs may go beyond, by one each."""
        for stored, most, whose in (
            (session.stored, session.capacity, f"session {session.id!r}"),
            (self._stored, self._most_tokens, "all sessions"),
        ):
            if stored + tokens > most:
                raise RequestError(
                    f"{whose} may store {most} tokens; {stored} are stored and {tokens} would be added: "
                    "close it, or open one with a larger capacity_of_str_len",
                    code="session_full",
                    param="session_params",
                )
        if len(session.nodes) + turns > MAX_TURNS:
            raise RequestError(
                f"session {session.id!r} has {len(session.nodes)} requests, it may have {MAX_TURNS}",
                code="session_full",
                param="session_params",
            )

    def count(self, session: _Session, tokens: int) -> None:
        session.stored += tokens
        if self._open.get(session.id) is session:
            self._stored += tokens

    def remove(self, session: _Session, node: _Node) -> None:
        del session.nodes[node.rid]
        self.count(session, -len(node.prompt) - len(node.output))

    # ------------------------------------------------------------------ ends
    def _expire(self, session: _Session) -> None:
        loop = asyncio.get_running_loop()
        left = session.timeout if session.running else session.last_use + session.timeout - loop.time()
        if left > 0:
            session.timer = loop.call_later(left, self._expire, session)
        else:
            self._drop(session)

    def _drop(self, session: _Session) -> None:
        del self._open[session.id]
        self._stored -= session.stored
        if session.timer is not None:
            session.timer.cancel()
        self._forget(session.key)


def _busy(session: _Session, ref: SessionRef, what: str) -> RequestError:
    return RequestError(
        f"{what} of session {session.id!r} is running: go on when it has finished",
        code="session_busy",
        param=ref.param("rid"),
        status=409,
    )


def _unknown(session_id: str, param: str) -> RequestError:
    return RequestError(
        f"there is no session {session_id!r}: it was not opened, or is closed (by its timeout, perhaps)",
        code="unknown_session",
        param=param,
        status=404,
    )
