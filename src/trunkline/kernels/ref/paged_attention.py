"""Variable-length paged attention from torch's fused CPU kernel, in shapes that only depend on positions.

Bits must not depend on the batch, so every matrix product that a token takes part in has a shape and a place
in it that follow from the token's position alone:

- queries are cut into tiles at fixed positions: tile i holds positions [i * rows, (i + 1) * rows). A token at
  position p is always row p % rows of a full tile; absent neighbors are zeros.
- the keys that a tile reads are those of a fixed span [start, end) of positions, a function of the tile's
  position. Masking hides those above a query's own position or outside its window; slots that don't exist
  yet are read from the slot of zeros behind the pool's pages, so that nothing unwritten can reach a sum.

The fused kernel works on each (tile, key/value head) alone, in blocks of 512 keys with a running softmax in
float32, and runs its products on one thread. Tiles that share a request share one gathered copy of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.ops import PagedShape, by_token
from trunkline.kernels.ref.quantized import dequantize_kv

_TILE_ROWS = 8  # query rows (tokens x heads of a group) that a tile aims at: decode is fast, prefill is fair
_SHORT_SPANS = (128, 256, 512)  # ends of spans for the first positions; then multiples of the last
_SPAN = _SHORT_SPANS[-1]
_FEW_TILES = 2  # up to here a request's tiles each get their own copy of the keys, so that requests batch
_CALL_KEYS = 1 << 12  # most gathered keys of a call, unless one request needs more: they stay in cache
_CALL_MASK = 1 << 22  # most mask elements of a call
_KEPT_MASKS = 1 << 24  # most mask elements kept for all layers; further masks are made in each layer


@dataclass(frozen=True)
class _Call:
    """One run of the fused kernel: tiles [first, first + count), all of the span [start, end)."""

    first: int
    count: int
    start: int
    end: int
    window: int | None
    slots: Tensor  # [gathered requests * (end - start)]
    positions: Tensor  # [count, tile rows]: position of each query row
    mask: Tensor | None  # [count, 1, tile rows, end - start], None: made when needed


@dataclass(frozen=True)
class AttentionPlan:
    """The tiles of a step, and where each token's heads lie in them."""

    shape: PagedShape
    tokens_per_tile: int
    num_tiles: int
    q_rows: Tensor  # [T * K]: row of the tile buffer, in units of G * D, of each token's query group
    out_rows: Tensor  # [T * H]: row of the result, in units of D
    calls: tuple[_Call, ...]


def plan_attention(
    q_start: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    window: int | None,
    shape: PagedShape,
    tree_mask: Tensor | None = None,
) -> AttentionPlan:
    device = q_start.device
    starts, lengths, pages = (t.cpu().numpy().astype(np.int64) for t in (q_start, seq_lens, page_table))
    if tree_mask is not None:
        starts, lengths, pages = _paths(starts, lengths, pages, tree_mask.cpu().numpy(), shape.page_size)
        shape = replace(shape, page_size=1)
    group = shape.num_heads // shape.num_kv_heads
    per_tile = max(1, _TILE_ROWS // group)
    q_lens = starts[1:] - starts[:-1]
    requests = np.repeat(np.arange(len(lengths)), q_lens)
    positions = np.arange(len(requests)) - np.repeat(starts[1:] - lengths, q_lens)

    # Tiles in order of (request, position), then sorted by the call that serves them.
    is_first = np.ones(len(requests), bool)
    index = positions // per_tile
    is_first[1:] = (requests[1:] != requests[:-1]) | (index[1:] != index[:-1])
    tile_of_token = is_first.cumsum() - 1
    tile_request, tile_index = requests[is_first], index[is_first]
    ends = _span_end(tile_index * per_tile)
    order, groups = _group_tiles(tile_request, ends)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))

    calls, first, kept = [], 0, 0
    for shared, tiles in groups:
        end = int(ends[tiles[0]])
        start = _span_start(end, window)
        count, elements = len(tiles), len(tiles) * per_tile * group * (end - start)
        gathered = tile_request[tiles[:1] if shared else tiles]
        slots = _slots(pages[gathered], lengths[gathered], start, end, shape)
        rows = tile_index[tiles][:, None] * per_tile + np.arange(per_tile)
        rows_tensor = torch.from_numpy(np.repeat(rows, group, axis=1)).to(device)
        kept += elements
        mask = _mask(rows_tensor, start, end, window) if kept <= _KEPT_MASKS else None
        calls.append(
            _Call(first, count, start, end, window, torch.from_numpy(slots).to(device), rows_tensor, mask)
        )
        first += count
    at, lane = place[tile_of_token], positions % per_tile
    kv_heads, heads = np.arange(shape.num_kv_heads), np.arange(shape.num_heads)
    q_rows = (at[:, None] * shape.num_kv_heads + kv_heads) * per_tile + lane[:, None]
    out_rows = ((at * per_tile + lane)[:, None] * group + heads % group) * shape.num_kv_heads + heads // group
    return AttentionPlan(
        shape,
        per_tile,
        len(order),
        torch.from_numpy(q_rows.reshape(-1)).to(device),
        torch.from_numpy(out_rows.reshape(-1)).to(device),
        tuple(calls),
    )


def attention(q: Tensor, pool: Tensor, plan: AttentionPlan) -> Tensor:
    shape, rows = plan.shape, plan.tokens_per_tile
    tokens, heads, dim = q.shape
    kv_heads, group = shape.num_kv_heads, heads // shape.num_kv_heads
    tiles = torch.zeros(plan.num_tiles * kv_heads * rows, group * dim, device=q.device)
    tiles.index_copy_(0, plan.q_rows, q.reshape(-1, group * dim).float())
    tiles = tiles.view(plan.num_tiles, kv_heads, rows * group, dim)
    parts = [_run(tiles[call.first : call.first + call.count], pool, call, shape) for call in plan.calls]
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result.index_select(0, plan.out_rows).view(tokens, heads, dim).to(q.dtype)


def _run(q: Tensor, pool: Tensor, call: _Call, shape: PagedShape) -> Tensor:
    """Tiles [n, K, rows, D] -> [n * rows * K, D]."""
    count, kv_heads, _, dim = q.shape
    span = call.end - call.start
    kv = by_token(pool)[call.slots // pool.shape[-2], call.slots % pool.shape[-2]]
    kv = dequantize_kv(kv) if kv.dtype == torch.int8 else kv.float()
    kv = kv.view(-1, span, 2, kv_heads, dim)
    mask = call.mask if call.mask is not None else _mask(call.positions, call.start, call.end, call.window)
    copies = count
    if count * kv_heads == 1:
        copies = 2  # a single product would be spread over threads, in another order
        q = q.expand(copies, -1, -1, -1)
    if kv.shape[0] == 1:
        kv = kv.expand(copies, -1, -1, -1, -1)
        mask = mask.expand(copies, -1, -1, -1)
    key, value = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    if shape.soft_cap:
        out = torch.stack([_capped(*one, shape) for one in zip(q, key, value, mask, strict=True)])
    elif q.device.type == "cpu":
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, key, value, 0.0, False, attn_mask=mask, scale=shape.score_scale
        )[0]
    else:
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=shape.score_scale)
    return out[:count].transpose(1, 2).reshape(-1, dim)


def _capped(q: Tensor, key: Tensor, value: Tensor, mask: Tensor, shape: PagedShape) -> Tensor:
    """One tile [K, rows, D], by products and sums along the last dimension, whose order is fixed: no fused
    kernel caps scores."""
    scores = torch.stack([(row[:, None] * key).sum(-1) for row in q.unbind(1)], 1) * shape.score_scale
    weights = (shape.soft_cap * (scores / shape.soft_cap).tanh() + mask).softmax(-1)
    columns = value.transpose(1, 2).contiguous()  # [K, D, keys]
    return torch.stack([(row[:, None] * columns).sum(-1) for row in weights.unbind(1)], 1)


def _paths(
    starts: np.ndarray, lengths: np.ndarray, pages: np.ndarray, mask: np.ndarray, page_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each token of a tree as a request of its own, whose last keys are those it sees. Pages become slots."""
    if mask.dtype != np.bool_ or mask.ndim != 2 or len(mask) != starts[-1]:
        raise ValueError(f"tree_mask is {list(mask.shape)} {mask.dtype}; bool [{starts[-1]}, *] is expected")
    q_lens, rows = [], []
    for request, (begin, end) in enumerate(pairwise(starts)):
        count, positions = end - begin, np.arange(lengths[request])
        slots = pages[request, positions // page_size] * page_size + positions % page_size
        if not 1 < count <= mask.shape[1]:
            q_lens.append(count)
            rows.append(slots)
            continue
        prefix, sees = lengths[request] - count, mask[begin:end, :count]
        if not sees.diagonal().all() or np.triu(sees, 1).any():
            raise ValueError(f"tree_mask of request {request}: a token sees itself, and none after it")
        q_lens += [1] * count
        rows += [np.concatenate((slots[:prefix], slots[prefix:][row])) for row in sees]
    table = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
    for to, slots in zip(table, rows, strict=True):
        to[: len(slots)] = slots
    return np.cumsum([0, *q_lens]), np.array([len(slots) for slots in rows]), table


def _span_end(position: np.ndarray) -> np.ndarray:
    """End of the keys that a tile beginning at `position` reads. Tiles never straddle a boundary."""
    ends = (position // _SPAN + 1) * _SPAN
    for end in reversed(_SHORT_SPANS):
        ends = np.where(position < end, end, ends)
    return ends


def _span_start(end: int, window: int | None) -> int:
    """First key that any tile of the span can see, rounded down to where the kernel's blocks begin."""
    if window is None or end <= _SPAN:
        return 0
    return max(0, end - _SPAN - window + 1) // _SPAN * _SPAN


def _group_tiles(request: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, list[tuple[bool, np.ndarray]]]:
    """Split tiles into calls: (whether all tiles share one request's keys, the tiles), and their order."""
    changes = np.flatnonzero((request[1:] != request[:-1]) | (ends[1:] != ends[:-1])) + 1
    runs = np.split(np.arange(len(request)), changes)
    groups: list[tuple[bool, np.ndarray]] = []
    few: dict[int, list[np.ndarray]] = {}
    for run in runs:
        end = int(ends[run[0]])
        if len(run) <= _FEW_TILES:
            few.setdefault(end, []).append(run)
        else:
            limit = max(1, _CALL_MASK // (_TILE_ROWS * end))
            groups += [(True, run[i : i + limit]) for i in range(0, len(run), limit)]
    for end, parts in few.items():
        tiles, limit = np.concatenate(parts), max(1, _CALL_KEYS // end)
        groups += [(False, tiles[i : i + limit]) for i in range(0, len(tiles), limit)]
    return np.concatenate([tiles for _, tiles in groups]), groups


def _slots(pages: np.ndarray, lengths: np.ndarray, start: int, end: int, shape: PagedShape) -> np.ndarray:
    """Slots of positions [start, end) for each request, flat; those not written yet are the slot of zeros."""
    positions = np.arange(start, end)
    page = pages[:, np.minimum(positions // shape.page_size, pages.shape[1] - 1)]
    slots = page * shape.page_size + positions % shape.page_size
    return np.where(positions < lengths[:, None], slots, shape.num_slots).reshape(-1)


def _mask(positions: Tensor, start: int, end: int, window: int | None) -> Tensor:
    """[n, 1, rows, end - start]: 0 where a query sees the key, else -inf."""
    keys, queries = torch.arange(start, end, device=positions.device), positions[:, None, :, None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return torch.zeros(visible.shape, device=positions.device).masked_fill_(~visible, float("-inf"))
