"""The C++ module (csrc/cpu/module.cpp). Raises ValueError with the numbers for what does not fit."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

def isas() -> list[str]: ...
def isa() -> str: ...
def select_isa(name: str) -> None: ...

# `bits` 0: float32 or bfloat16, as the panels; 8 or 4: whole numbers in uint8, `group` inputs to a scale.
def packed_bytes(n: int, k: int, itemsize: int, bits: int, group: int, gated: bool) -> int: ...
def pack(weights: list[Tensor], gated: bool, bits: int, group: int, panels: Tensor, threads: int) -> None: ...
def linear(
    x: Tensor,
    panels: Tensor,
    bits: int,
    group: int,
    k: int,
    n: int,
    gate: int,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    threads: int,
) -> None: ...
def linear_top(
    x: Tensor,
    panels: Tensor,
    bits: int,
    group: int,
    k: int,
    n: int,
    choices: Any,
    at: Sequence[int],
    words: Tensor | None,
    tokens: Tensor,
    usable: Tensor,
    threads: int,
) -> None: ...
def choose(
    logits: Tensor,
    choices: Any,
    at: Sequence[int],
    words: Tensor | None,
    tokens: Tensor,
    usable: Tensor,
    threads: int,
) -> None: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, threads: int) -> None: ...
def rotate(x: Tensor, table: Tensor, gain: Tensor | None, eps: float, threads: int) -> None: ...
def embedding(token_ids: Tensor, table: Tensor, out: Tensor, threads: int) -> None: ...
def packed_embedding(
    token_ids: Tensor, panels: Tensor, bits: int, group: int, k: int, n: int, out: Tensor, threads: int
) -> None: ...
def store_kv(pool: Tensor, slots: Tensor, kv: Tensor, threads: int) -> None: ...
def probe(data: Tensor | None, bits: int, repeats: int, threads: int) -> float: ...

class LayerStack:
    def __init__(
        self, layers: list[Any], hidden: int, heads: int, kv_heads: int, dim: int, bf16: bool, eps: float
    ) -> None: ...
    def run(
        self,
        x: Tensor,
        rope: Tensor,
        slots: Tensor,
        pool: Tensor,
        plan: AttentionPlan,
        windows: list[int],
        threads: int,
    ) -> None: ...

class AttentionPlan:
    def __init__(
        self,
        q_start: Tensor,
        seq_lens: Tensor,
        page_table: Tensor,
        tree_mask: Tensor | None,
        window: int,
        group: int,
        page_size: int,
        num_slots: int,
        scale: float,
        soft_cap: float,
    ) -> None: ...
    @property
    def window(self) -> int: ...
    def stems(self) -> list[tuple[list[int], int, int]]:
        """Which requests share which blocks of 128 keys: (requests, from, to), parents before children."""

def attention(q: Tensor, pool: Tensor, plan: AttentionPlan, out: Tensor, threads: int) -> None: ...
