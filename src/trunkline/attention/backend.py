"""The backend protocol, and the KV pool that backends read and write.

A backend's `plan` is a pure function of the batch, called once a step; `run` is called by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trunkline.kernels.ops import Kernels, PagedShape, pool_size
from trunkline.kernels.pages import LARGE_PAGES, Populating, advise


class Batch(Protocol):
    """The part of a worker's ForwardBatch that attention reads. Shapes as in `kernels/ops.py`."""

    @property
    def q_start(self) -> Tensor: ...
    @property
    def seq_lens(self) -> Tensor: ...
    @property
    def page_table(self) -> Tensor: ...
    @property
    def slot_mapping(self) -> Tensor: ...
    @property
    def tree_mask(self) -> Tensor | None: ...


class AttentionBackend(Protocol):
    def plan(self, batch: Batch) -> Any:
        """Metadata of a step, the same for all layers."""
        ...

    def run(self, metadata: Any, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Store kv [T, 2, K, D] of the step's tokens, then attend q [T, H, D] over the paged KV."""
        ...

    def whole(self, metadata: Any) -> tuple[Tensor, Tensor, Sequence[Any]] | None:
        """What a kernel set needs to run all layers in one call: slots [T], the pool of all layers and a plan
        for each; None where storing or attending is more than the ops."""
        ...


class KVPool:
    """Keys and values of all layers, allocated once: [layers, *pool_size(shape, dtype)].

    The last page stays zero: it stands for positions that no token was written to.
    """

    def __init__(self, layers: int, shape: PagedShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        size = (layers, *pool_size(shape, dtype))
        # Not zeros: every slot is written before it is read, and a start should not wait for so much memory.
        self.data = torch.empty(size, dtype=dtype, device=device)
        if device.type == "cpu":
            advise(self.data, LARGE_PAGES)
        self.data[:, -1] = 0
        self._populating = Populating(self.data) if device.type == "cpu" else None

    def reach(self, page: int) -> None:
        """A step begins, which may be the first to write to pages up to `page`."""
        if self._populating:
            self._populating.reach(page)

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


class PagedBackend:
    """Runs the `attention` op of a kernel set; layers with the same window share a plan."""

    def __init__(self, kernels: Kernels, pool: KVPool, layer_windows: Sequence[int | None]) -> None:
        self.kernels = kernels
        self.pool = pool
        self.layer_windows = tuple(layer_windows)
        self.layers = tuple(pool.data.unbind(0))

    def plan(self, batch: Batch) -> tuple[Tensor, dict[int | None, Any]]:
        plans = {
            window: self.kernels.plan_attention(
                batch.q_start, batch.seq_lens, batch.page_table, window, self.pool.shape, batch.tree_mask
            )
            for window in set(self.layer_windows)
        }
        return batch.slot_mapping, plans

    def whole(
        self, metadata: tuple[Tensor, dict[int | None, Any]]
    ) -> tuple[Tensor, Tensor, Sequence[Any]] | None:
        slots, plans = metadata
        return slots, self.pool.data, [plans[window] for window in self.layer_windows]

    def run(
        self, metadata: tuple[Tensor, dict[int | None, Any]], layer: int, q: Tensor, kv: Tensor
    ) -> Tensor:
        slots, plans = metadata
        pool = self.layers[layer]
        self.kernels.store_kv(pool, slots, kv)
        return self.kernels.attention(q, pool, plans[self.layer_windows[layer]])
