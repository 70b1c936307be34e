"""Prefix cache: a radix tree of KV pages (RadixAttention, Zheng et al. 2023, arXiv:2312.07104).

An edge of the tree covers whole pages, and its node owns them. A request holds a `Lease`: a path of the tree,
locked, followed by pages of its own. `publish` moves verified pages from the lease to the tree. When the tree
already holds the same tokens, the lease adopts the tree's pages and frees its copy: kernels are
batch-invariant, so the two hold the same bits, and every prefix is stored once.

Only this module changes pages, nodes and leases.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import msgspec

from trunkline.cache.miss import MAX_BRANCHES, MAX_LOST_ROOTS, SHOWN, Lost, elsewhere, explain
from trunkline.cache.pages import PagePool
from trunkline.messages import TreeEdge
from trunkline.types import CacheKey, Explain, PrefixMiss, SessionTurn


@dataclass(eq=False, slots=True)
class Node:
    """One edge of the tree. `tokens` has `page_size` entries per page.

    `locks` counts the leases that end here or below, so an unlocked node has no locked descendant.
    """

    parent: Node | None
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)  # by the tokens of their first page
    locks: int = 0
    last_use: int = 0
    key: CacheKey | None = None  # of a root
    number: int = 0  # names it to whoever looks from outside
    sessions: frozenset[str] = frozenset()  # those whose sequences end here: evicted after all others
    lost: Lost = field(default_factory=Lost)  # continuations that were here once
    moves: int = 0  # of its end, whose tokens are others since


@dataclass(eq=False, slots=True)
class Lease:
    """What one request holds: `pages` is its page table; the first `num_shared` of them belong to the tree.

    Read-only to everybody but the cache.
    """

    key: CacheKey
    node: Node
    pages: list[int]
    num_shared: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a turn of a session ended: its tokens lead to the end of `node`, until that moves. (What stands
    above a node stays as it is while the node is there; only edges may be cut in two.)"""

    key: CacheKey
    node: Node
    moves: int  # of the node, then
    num_pages: int  # from the root to there


@dataclass(frozen=True, slots=True)
class Swap:
    """Entries `[start, start + len(pages))` of a lease's page table changed to the tree's identical pages."""

    start: int
    pages: list[int]


class PrefixCache:
    """Owner of the page pool and of the tree over it.

    With `enabled=False` nothing is ever shared; pages are handed out and taken back all the same.
    """

    def __init__(self, num_pages: int, page_size: int, enabled: bool = True) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.enabled = enabled
        self.evicted_tokens = 0  # counter since start
        self._pool = PagePool(num_pages)
        self._roots: dict[CacheKey, Node] = {}
        self._leases: set[Lease] = set()
        self._clock = 0
        self._evictable = 0  # pages of unlocked nodes
        self._num_nodes = 0
        self._numbers = 0
        self._offers = 0
        self._kept: dict[
            str, dict[int, _Place]
        ] = {}  # session -> turn -> where it ended, on nodes with its tag
        self._by_age: list[tuple[bool, int, int, Node]] = []  # heap over unlocked leaves; may hold stale ones
        self._lost_roots: dict[CacheKey, Lost] = {}  # of namespaces that nothing is cached of any more

    # ------------------------------------------------------------------ sizes
    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def free_pages(self) -> int:
        return self._pool.num_free

    @property
    def evictable_pages(self) -> int:
        return self._evictable

    @property
    def available_pages(self) -> int:
        """Pages that `grow` can hand out: free ones, and those of unlocked nodes."""
        return self._pool.num_free + self._evictable

    @property
    def num_edges(self) -> int:
        return self._num_nodes

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # ------------------------------------------------------------------ lookup
    def match_length(
        self, key: CacheKey, tokens: Sequence[int], limit: int, turn: SessionTurn | None = None
    ) -> int:
        """Tokens of the longest cached prefix of `tokens[:limit]`, in whole pages. Changes nothing. Linear in
        them; in those behind the turn that `turn` follows, if that one's end is still there."""
        node, above = self._begin(key, limit, turn)
        below = 0 if node is None else sum(count for _, count in self._walk(node, above, tokens, limit))
        return (above + below) * self.page_size

    def _begin(self, key: CacheKey, limit: int, turn: SessionTurn | None) -> tuple[Node | None, int]:
        """Where to look on from, and the pages up to there: the end of the turn before, or the root."""
        if turn is not None:
            place = self._kept.get(turn.session, {}).get(turn.follows)
            if place is not None and place.key == key and place.moves == place.node.moves:
                if place.num_pages * self.page_size <= min(turn.kept, limit):
                    return place.node, place.num_pages
        return self._roots.get(key), 0

    def _walk(self, node: Node, above: int, tokens: Sequence[int], limit: int) -> Iterator[tuple[Node, int]]:
        """Yield (node, matched pages) along `tokens[:limit]` below a node with `above` pages up to its end;
        the last may match in part."""
        size, at = self.page_size, above * self.page_size
        while limit - at >= size:
            child = node.children.get(tuple(tokens[at : at + size]))
            if child is None:
                return
            matched = self._common_pages(child, tokens, at, limit)
            yield child, matched
            if matched < len(child.pages):
                return
            node, at = child, at + matched * size

    def _common_pages(self, node: Node, tokens: Sequence[int], at: int, limit: int) -> int:
        """Leading pages of `node` equal to `tokens[at:limit]`; the first page is known to be."""
        size = self.page_size
        high = min(len(node.pages), (limit - at) // size)
        if tokens[at : at + high * size] == node.tokens[: high * size]:
            return high
        low = 1  # invariant: `low` pages match, `high` pages do not
        while high - low > 1:
            middle = (low + high) // 2
            if tokens[at + low * size : at + middle * size] == node.tokens[low * size : middle * size]:
                low = middle
            else:
                high = middle
        return low

    def explain(self, lease: Lease, tokens: list[int], limit: int, how: Explain) -> PrefixMiss:
        """Why a lease that was just acquired for `tokens[:limit]` holds no more of them. Changes nothing.

        Time is linear in the branches at that place, up to a bound.
        """
        node, matched = lease.node, lease.num_shared * self.page_size
        ends = self.page_size + SHOWN
        branches = [child.tokens[:ends] for child in islice(node.children.values(), MAX_BRANCHES)]
        miss = explain(tokens, limit, matched, self.page_size, branches, node.lost, how == "tokens")
        miss = msgspec.structs.replace(miss, branches=len(node.children))
        if not self.enabled:
            return msgspec.structs.replace(miss, reason="disabled")
        if miss.reason in ("empty", "other_tokens", "end_of_branch", "evicted", "flushed"):
            others = elsewhere(
                lease.key, self._roots, matched, lambda key: self.match_length(key, tokens, limit)
            )
            return msgspec.structs.replace(miss, elsewhere=others)
        return miss

    # ------------------------------------------------------------------ leases
    def acquire(self, key: CacheKey, tokens: list[int], limit: int, turn: SessionTurn | None = None) -> Lease:
        """Lock the longest cached prefix of `tokens[:limit]` and return a lease of it (maybe empty).

        `limit` is at most `len(tokens) - 1`: the last token is always computed, its logits are needed. For
        `turn` see `match_length`.
        """
        node, above = self._begin(key, limit, turn)
        if node is None:
            lost = self._lost_roots.pop(key, Lost())
            node = self._roots[key] = Node(parent=None, key=key, number=self._next_number(), lost=lost)
        pages = _path(node)
        for child, matched in list(self._walk(node, above, tokens, limit)):
            node = child if matched == len(child.pages) else self._split(child, matched)
            pages += node.pages
        lease = Lease(key, node, pages, len(pages))
        self._lock(node)
        self._leases.add(lease)
        return lease

    def grow(self, lease: Lease, num_tokens: int) -> bool:
        """Give the lease pages for `num_tokens` tokens in all, evicting if need be.

        Returns False, with nothing changed, when that many pages are not to be had.
        """
        need = self.pages_for(num_tokens) - len(lease.pages)
        if need <= 0:
            return True
        if need > self.available_pages:
            return False
        if need > self._pool.num_free:
            self._evict(need - self._pool.num_free)
        lease.pages += self._pool.take(need)
        return True

    def publish(self, lease: Lease, tokens: list[int], num_tokens: int) -> Swap | None:
        """Share the full pages of `tokens[:num_tokens]`, whose KV is computed and verified.

        Returns the entries of the lease's page table that changed, if any.
        """
        size, start = self.page_size, lease.num_shared
        full = num_tokens // size
        if not self.enabled or full <= start:
            return None
        swapped = 0
        while lease.num_shared < full:
            at = lease.num_shared
            child = lease.node.children.get(tuple(tokens[at * size : (at + 1) * size]))
            if child is None:
                self._append(lease, tokens[at * size : full * size], full)
                break
            matched = self._common_pages(child, tokens, at * size, full * size)
            node = child if matched == len(child.pages) else self._split(child, matched)
            self._pool.give(lease.pages[at : at + matched])
            lease.pages[at : at + matched] = node.pages
            self._relock(lease, node)
            swapped = lease.num_shared - start  # swaps come first: below a new edge there is nothing to adopt
        return Swap(start, lease.pages[start : start + swapped]) if swapped else None

    def release(self, lease: Lease) -> None:
        """End a lease: its own pages become free, the shared ones stay in the tree until evicted."""
        self._leases.remove(lease)
        self._pool.give(lease.pages[lease.num_shared :])
        self._unlock(lease.node)
        lease.pages = []
        lease.num_shared = 0

    def keep(self, turn: SessionTurn, lease: Lease) -> None:
        """Tag the shared end of a lease: while the session lasts, its pages are evicted after untagged ones,
        and turns that follow this one look on from there. It takes nothing from `available_pages`."""
        node = lease.node
        if node.parent is not None:
            node.sessions |= {turn.session}
            place = _Place(lease.key, node, node.moves, lease.num_shared)
            self._kept.setdefault(turn.session, {})[turn.number] = place

    def end_session(self, session: str) -> None:
        """Take a session's tags away; the pages stay until they are evicted. Unknown sessions are ignored."""
        for node in {place.node for place in self._kept.pop(session, {}).values()}:
            node.sessions -= {session}
            self._offer(node)

    def flush(self) -> int:
        """Drop every page that no lease holds. Returns the tokens dropped."""
        dropped = self._evictable * self.page_size
        self._evict(self._evictable, "flushed")
        return dropped

    # ------------------------------------------------------------------ the tree
    def _append(self, lease: Lease, tokens: list[int], full: int) -> None:
        """Hand the lease's pages up to page `full` to the tree, below the lease's node."""
        node, pages = lease.node, lease.pages[lease.num_shared : full]
        if node.parent is not None and node.locks == 1 and not node.children:
            node.lost = Lost()  # what was lost stood at its old end
            node.moves += 1
            node.tokens += tokens  # the lease is the only one to see this leaf: lengthen it in place
            node.pages += pages
        else:
            leaf = Node(node, tokens, pages, number=self._next_number())
            node.children[tuple(tokens[: self.page_size])] = leaf
            self._num_nodes += 1
            self._evictable += len(pages)  # until the lock below takes them
            self._relock(lease, leaf)
        lease.num_shared = full

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut the first `num_pages` off `node` into a new parent. `node` stays the lower part, so leases keep
        pointing at their end."""
        cut, parent = num_pages * self.page_size, node.parent
        assert parent is not None
        upper = Node(
            parent,
            node.tokens[:cut],
            node.pages[:num_pages],
            locks=node.locks,
            last_use=node.last_use,
            number=self._next_number(),
        )
        parent.children[tuple(upper.tokens[: self.page_size])] = upper
        node.tokens, node.pages, node.parent = node.tokens[cut:], node.pages[num_pages:], upper
        upper.children[tuple(node.tokens[: self.page_size])] = node
        self._num_nodes += 1
        return upper

    def _relock(self, lease: Lease, child: Node) -> None:
        """Move the end of a lease one node down; its ancestors are locked already."""
        if child.locks == 0:
            self._evictable -= len(child.pages)
        child.locks += 1
        self._clock += 1
        child.last_use = self._clock
        lease.node = child
        lease.num_shared += len(child.pages)

    def _lock(self, node: Node) -> None:
        self._clock += 1
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self._evictable -= len(at.pages)
            at.locks += 1
            at.last_use = self._clock
            at = at.parent

    def _unlock(self, node: Node) -> None:
        self._clock += 1
        at: Node | None = node
        while at is not None:
            at.locks -= 1
            at.last_use = self._clock
            if at.locks == 0:
                self._evictable += len(at.pages)
                self._offer(at)
            at = at.parent

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    # ------------------------------------------------------------------ what it looks like from outside
    def outline(self, most: int, head: int) -> list[TreeEdge]:
        """At most `most` edges, parents first, with their first `head` tokens: those that requests hold, then
        those used last. Takes time of the order of `most`, whatever the tree holds; changes nothing."""
        shown: dict[Node, int] = {}  # node -> its children that are shown
        for lease in self._leases:
            self._show(lease.node, shown, most)
        nearby: list[tuple[int, int, Node]] = []  # heap of nodes whose parents are shown, last used first
        for root in islice(self._roots.values(), most):
            self._show(root, shown, most)
        for node in list(shown):
            self._find_children(node, shown, nearby, most)
        while nearby and len(shown) < most:
            node = heapq.heappop(nearby)[2]
            self._show(node, shown, most)
            self._find_children(node, shown, nearby, most)
        return [
            TreeEdge(
                node.number,
                0 if node.parent is None else node.parent.number,
                len(node.tokens),
                node.locks,
                self._clock - node.last_use,
                len(node.children) - children,
                node.tokens[:head],
            )
            for node, children in shown.items()
        ]

    @staticmethod
    def _show(node: Node, shown: dict[Node, int], most: int) -> None:
        """Add a node and what of its path is missing, if there is room for all of it."""
        path: list[Node] = []
        at: Node | None = node
        while at is not None and at not in shown:
            path.append(at)
            at = at.parent
        if len(shown) + len(path) > most:
            return
        for step in reversed(path):
            shown[step] = 0
            if step.parent is not None:
                shown[step.parent] += 1

    @staticmethod
    def _find_children(
        node: Node, shown: dict[Node, int], nearby: list[tuple[int, int, Node]], most: int
    ) -> None:
        """Only the newest of many children, and none when there are candidates enough."""
        for child in islice(reversed(node.children.values()), max(0, 4 * most - len(nearby))):
            if child not in shown:
                heapq.heappush(nearby, (-child.last_use, child.number, child))

    # ------------------------------------------------------------------ eviction: oldest leaf, sessions last
    def _offer(self, node: Node) -> None:
        """Put an unlocked leaf up for eviction."""
        if node.locks or node.children:
            return
        if node.parent is None:
            assert node.key is not None
            del self._roots[node.key]
            if node.lost.pages:
                while len(self._lost_roots) >= MAX_LOST_ROOTS:
                    del self._lost_roots[next(iter(self._lost_roots))]
                self._lost_roots[node.key] = node.lost
            return
        if len(self._by_age) > 2 * self._num_nodes + 64:
            self._by_age = [entry for entry in self._by_age if self._is_current(entry)]
            heapq.heapify(self._by_age)
        self._offers += 1  # breaks ties: nodes have no order
        heapq.heappush(self._by_age, (bool(node.sessions), node.last_use, self._offers, node))

    @staticmethod
    def _is_current(entry: tuple[bool, int, int, Node]) -> bool:
        tagged, last_use, _, node = entry
        same = node.last_use == last_use and bool(node.sessions) == tagged
        return same and bool(node.pages) and not (node.locks or node.children)

    def _evict(self, count: int, why: Literal["evicted", "flushed"] = "evicted") -> None:
        """Free `count` pages of unlocked nodes, from the ends of the oldest leaves."""
        while count > 0:
            entry = heapq.heappop(self._by_age)
            if not self._is_current(entry):
                continue
            node = entry[3]
            parent, take = node.parent, min(count, len(node.pages))
            assert parent is not None
            keep = len(node.pages) - take
            first_page = tuple(node.tokens[: self.page_size])
            lost_page = node.tokens[keep * self.page_size : (keep + 1) * self.page_size]
            if keep:
                node.lost = Lost()
            (node if keep else parent).lost.note(lost_page, why)
            node.moves += 1
            self._pool.give(node.pages[keep:])
            del node.pages[keep:], node.tokens[keep * self.page_size :]
            self._evictable -= take
            self.evicted_tokens += take * self.page_size
            count -= take
            if keep:
                heapq.heappush(self._by_age, entry)
            else:
                del parent.children[first_page]
                self._num_nodes -= 1
                for session in node.sessions:
                    places = self._kept[session]
                    self._kept[session] = {
                        at: place for at, place in places.items() if place.node is not node
                    }
                self._offer(parent)

    # ------------------------------------------------------------------ invariants
    def check(self) -> None:
        """Assert that every page has one owner and that locks and counts agree with the leases.

        Costs time linear in pages and tree; run when idle, and after each step in tests.
        """
        owners = self._pool.free_ids()
        locks: dict[Node, int] = {}
        for lease in self._leases:
            owners += lease.pages[lease.num_shared :]
            at: Node | None = lease.node
            while at is not None:
                locks[at] = locks.get(at, 0) + 1
                at = at.parent
            path = _path(lease.node)
            assert path == lease.pages[: lease.num_shared], "a lease's shared pages differ from its path"
        evictable = nodes = 0
        stack = list(self._roots.values())
        offered = {entry[3] for entry in self._by_age if self._is_current(entry)}
        while stack:
            node = stack.pop()
            assert node.locks == locks.get(node, 0), f"{node.locks} locks, {locks.get(node, 0)} leases"
            assert len(node.tokens) == len(node.pages) * self.page_size, "edge length differs from its pages"
            for session in node.sessions:
                ends = [place.node for place in self._kept[session].values()]
                assert node in ends, "a tag without its session"
            owners += node.pages
            evictable += 0 if node.locks else len(node.pages)
            if node.parent is not None:
                nodes += 1
                assert node.pages, "empty edge"
                assert node.locks or node.children or node in offered, "an unlocked leaf can't be evicted"
            for first_page, child in node.children.items():
                assert child.parent is node and tuple(child.tokens[: self.page_size]) == first_page
                stack.append(child)
        for place in (place for places in self._kept.values() for place in places.values()):
            if place.moves == place.node.moves:
                assert len(_path(place.node)) == place.num_pages, "a turn ends elsewhere than it did"
        assert sorted(owners) == list(range(self.num_pages)), "pages are lost or have two owners"
        assert evictable == self._evictable, f"{evictable} evictable pages, counted {self._evictable}"
        assert nodes == self._num_nodes, f"{nodes} nodes, counted {self._num_nodes}"


def _path(node: Node) -> list[int]:
    """The pages from the root to the end of a node."""
    edges: list[list[int]] = []
    at: Node | None = node
    while at is not None:
        edges.append(at.pages)
        at = at.parent
    return [page for edge in reversed(edges) for page in edge]
