"""The kernel set of a CPU: allocates results and calls `native`, which checks every argument.

torch is imported first: the native module then shares its OpenMP runtime.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trunkline.kernels.cpu import native
from trunkline.kernels.cpu.native import AttentionPlan, isa, isas, select_isa
from trunkline.kernels.ops import (
    Activation,
    Choices,
    LayerStack,
    LayerWeights,
    PackedLinear,
    PagedShape,
    Quantization,
    TokenMasks,
)

__all__ = [
    "attention",
    "choose",
    "embedding",
    "embedding_table",
    "gated_linear",
    "isa",
    "isas",
    "layer_stack",
    "limits",
    "linear",
    "pack_gated",
    "pack_linear",
    "plan_attention",
    "rms_norm",
    "rope",
    "select_isa",
    "store_kv",
    "supports_linear",
    "top",
]

_PANEL = 16  # output columns of a panel
_PAGE = 4096  # bytes; 17 to 64 rows take a twentieth longer where weights begin elsewhere


def supports_linear(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def pack_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor], quantization: Quantization | None = None
) -> PackedLinear:
    bias = None
    if biases:
        bias = torch.cat([b.float() for b in biases])
        bias = torch.nn.functional.pad(bias, (0, -len(bias) % _PANEL))
    return _pack(weights, sum(len(w) for w in weights), bias, quantization, gated=False)


def pack_gated(
    gate: Tensor,
    up: Tensor,
    biases: Sequence[Tensor],
    quantization: Quantization | None = None,
    activation: Activation = "silu",
) -> PackedLinear:
    bias = None
    if biases:
        padded = [torch.nn.functional.pad(b.float(), (0, -len(b) % _PANEL)) for b in biases]
        bias = torch.stack([b.view(-1, _PANEL) for b in padded], dim=1).view(-1)
    return replace(_pack([gate, up], len(gate), bias, quantization, gated=True), activation=activation)


def _pack(
    weights: Sequence[Tensor],
    outputs: int,
    bias: Tensor | None,
    quantization: Quantization | None,
    *,
    gated: bool,
) -> PackedLinear:
    inputs, dtype = weights[0].shape[1], weights[0].dtype
    bits, group = _format(quantization)
    size = native.packed_bytes(outputs, inputs, dtype.itemsize, bits, group, gated)
    room = torch.empty(size + _PAGE, dtype=torch.uint8)
    data = room[-room.data_ptr() % _PAGE :][:size].view(torch.uint8 if bits else dtype)
    native.pack([w.contiguous() for w in weights], gated, bits, group, data, torch.get_num_threads())
    return PackedLinear(data, bias, inputs, outputs, size, gated, quantization)


def _format(quantization: Quantization | None) -> tuple[int, int]:
    return (0, 0) if quantization is None else (quantization.bits, quantization.group)


def linear(
    x: Tensor,
    packed: PackedLinear,
    residual: Tensor | None = None,
    wide: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty(x.shape[0], packed.out_features, dtype=torch.float32 if wide else x.dtype)
    native.linear(
        x,
        packed.data,
        *_format(packed.quantization),
        packed.in_features,
        packed.out_features,
        packed.gate_number,
        packed.bias,
        residual,
        out,
        torch.get_num_threads(),
    )
    return out


gated_linear = linear  # the packed weight says what its gate is


def top(
    x: Tensor, packed: PackedLinear, masks: TokenMasks | None = None, choices: Choices | None = None
) -> tuple[Tensor, Tensor]:
    tokens = torch.empty(x.shape[0], dtype=torch.int64)
    usable = torch.empty(x.shape[0], dtype=torch.uint8)
    at, words = _mask_words(masks)
    native.linear_top(
        x,
        packed.data,
        *_format(packed.quantization),
        packed.in_features,
        packed.out_features,
        choices,
        at,
        words,
        tokens,
        usable,
        torch.get_num_threads(),
    )
    unsure = (usable == 2).nonzero()[:, 0]
    if choices is not None and len(unsure):  # about one row in ten thousand with top-p
        logits = linear(x[unsure], packed, wide=True)
        tokens[unsure], good = choose(logits, choices.rows(unsure), _masks_of(masks, unsure))
        usable[unsure] = good.byte()
    return tokens, usable.bool()


def _masks_of(masks: TokenMasks | None, rows: Tensor) -> TokenMasks | None:
    """The masks of some of the rows, which are numbered anew."""
    if masks is None:
        return None
    place = {row: i for i, row in enumerate(rows.tolist())}
    kept = [i for i, row in enumerate(masks.at) if row in place]
    return TokenMasks([place[masks.at[i]] for i in kept], masks.words[kept]) if kept else None


def choose(logits: Tensor, choices: Choices, masks: TokenMasks | None = None) -> tuple[Tensor, Tensor]:
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    usable = torch.empty(logits.shape[0], dtype=torch.uint8)
    at, words = _mask_words(masks)
    native.choose(logits, choices, at, words, tokens, usable, torch.get_num_threads())
    return tokens, usable.bool()


def _mask_words(masks: TokenMasks | None) -> tuple[Sequence[int], Tensor | None]:
    return ((), None) if masks is None else (masks.at, torch.from_numpy(masks.words))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    native.rms_norm(x, weight, eps, out, torch.get_num_threads())
    return out


def rope(x: Tensor, table: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> None:
    native.rotate(x, table, gain, eps, torch.get_num_threads())


@dataclass(frozen=True)
class HeadTable:
    """An embedding that lies in the packed output head; rows come out in `dtype`."""

    head: PackedLinear
    dtype: torch.dtype


def embedding_table(weight: Tensor, head: PackedLinear | None) -> Tensor | HeadTable:
    return weight if head is None else HeadTable(head, weight.dtype)


def embedding(token_ids: Tensor, table: Tensor | HeadTable) -> Tensor:
    threads = torch.get_num_threads()
    if isinstance(table, HeadTable):
        head = table.head
        out = torch.empty(len(token_ids), head.in_features, dtype=table.dtype)
        native.packed_embedding(
            token_ids,
            head.data,
            *_format(head.quantization),
            head.in_features,
            head.out_features,
            out,
            threads,
        )
    else:
        out = torch.empty(len(token_ids), table.shape[1], dtype=table.dtype)
        native.embedding(token_ids, table, out, threads)
    return out


def store_kv(pool: Tensor, slots: Tensor, kv: Tensor) -> None:
    native.store_kv(pool, slots, kv, torch.get_num_threads())


def limits(seconds: float) -> dict[str, float]:
    """What the instruction set in use reaches at best, each measured for about so long: bytes read a second,
    and operations a second on numbers of 32, 16 and 8 bits."""
    threads = torch.get_num_threads()
    memory = torch.zeros(192 << 20, dtype=torch.uint8)  # more than caches hold
    found = {"read": _fastest(memory, 8, seconds, threads)}
    return found | {f"{bits} bits": _fastest(None, bits, seconds, threads) for bits in (32, 16, 8)}


def _fastest(data: Tensor | None, bits: int, seconds: float, threads: int) -> float:
    repeats, best = 1 if data is not None else 1000, 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        done = native.probe(data, bits, repeats, threads)
        took = time.perf_counter() - started
        best = max(best, done / took)
        if took < seconds / 20:
            repeats *= 2
    return best


class _Stack:
    """`LayerStack` in one native call."""

    def __init__(self, layers: Sequence[LayerWeights], heads: int, kv_heads: int, eps: float) -> None:
        hidden, first = len(layers[0].input_norm), layers[0]
        dim = first.qkv.out_features // (heads + 2 * kv_heads)
        bf16 = first.input_norm.dtype == torch.bfloat16
        self._native = native.LayerStack(list(layers), hidden, heads, kv_heads, dim, bf16, eps)

    def __call__(
        self, x: Tensor, rope: Tensor, slots: Tensor, pool: Tensor, plans: Sequence[AttentionPlan]
    ) -> Tensor:
        windows = [plan.window for plan in plans]
        self._native.run(x, rope, slots, pool, plans[0], windows, torch.get_num_threads())
        return x


def layer_stack(layers: Sequence[LayerWeights], heads: int, kv_heads: int, eps: float) -> LayerStack | None:
    return _Stack(layers, heads, kv_heads, eps)


def plan_attention(
    q_start: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    window: int | None,
    shape: PagedShape,
    tree_mask: Tensor | None = None,
) -> AttentionPlan:
    return AttentionPlan(
        q_start,
        seq_lens,
        page_table,
        tree_mask,
        window or 0,
        shape.num_heads // shape.num_kv_heads,
        shape.page_size,
        shape.num_slots,
        shape.score_scale,
        shape.soft_cap,
    )


def attention(q: Tensor, pool: Tensor, plan: AttentionPlan) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    native.attention(q, pool, plan, out, torch.get_num_threads())
    return out
