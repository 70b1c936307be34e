"""The memory plan: what each part takes, from shapes alone, before anything is loaded (P16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from trunkline.config.schema import DTYPE_BYTES, Device, DType, KVType

if TYPE_CHECKING:
    from trunkline.config.model_spec import ModelSpec

# Resident size before any tensor exists of the engine's process (230 MiB, with torch 2.13) and the server's
# (50 to 100 MiB, by vocabulary). On a GPU: its context and the libraries' workspaces.
RUNTIME_BYTES: Mapping[Device, int] = {"cpu": 310 << 20, "cuda": 600 << 20}
# Sampling: float32 logits; in torch also a changed copy, weights and sums in float64, their order, and flags.
LOGIT_BYTES = 4
BYTES_PER_LOGIT = 44
# Native kernels choose row by row: a changed copy, weights, counts, candidates twice, for each thread.
THREAD_BYTES_PER_LOGIT = 24
# Bounds of the attention op: keys gathered for one call, and mask elements held for a step.
GATHERED_KEYS = 1 << 12
# Native kernels: working memory of the threads, and blocks of a long request that are merged after.
KERNEL_BYTES = 16 << 20
KEPT_MASKS = 1 << 24


class MemoryItem(msgspec.Struct, frozen=True):
    """One line of the plan. `how` says where the figure comes from."""

    name: str
    bytes: int
    how: str


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What will be used of the device's memory, and what there is. All sizes in bytes."""

    device: Device
    items: tuple[MemoryItem, ...]
    available: int
    total: int

    @property
    def needed(self) -> int:
        return sum(item.bytes for item in self.items)

    def size_of(self, name: str) -> int:
        return sum(item.bytes for item in self.items if item.name == name)

    def table(self) -> str:
        """The plan as lines of text: name, size, how it was found; then the sum and what is left."""
        rows = [(item.name, show(item.bytes), item.how) for item in self.items]
        rows.append(("planned", show(self.needed), ""))
        left = self.available - self.needed
        rows.append(("left free", show(left), f"of {show(self.available)} available"))
        name_width = max(len(row[0]) for row in rows)
        lines = [f"  {name:<{name_width}}  {size:>10}  {how}".rstrip() for name, size, how in rows]
        rule = "  " + "-" * (name_width + 12)
        return "\n".join([f"memory plan ({self.device})", *lines[:-2], rule, *lines[-2:]])


def show(size: int) -> str:
    """Bytes for people: "1.19 GiB"."""
    value, sign = float(abs(size)), "-" if size < 0 else ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{sign}{value:.0f} {unit}" if unit == "B" else f"{sign}{value:.1f} {unit}"
        value /= 1024
    return f"{sign}{value:.2f} GiB"


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What memory depends on, all but the size of the KV pool."""

    spec: ModelSpec
    dtype: DType
    kv_dtype: KVType
    device: Device
    page_size: int
    max_running: int
    max_context: int
    step_tokens: int
    native_kernels: bool = False
    threads: int = 1
    weight_bits: float | None = None  # of rounded weights, with their scales; the head's are 8

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers."""
        return self.spec.kv_bytes_per_token(self.kv_dtype)

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.token_bytes

    def weights(self) -> MemoryItem:
        """Held once: a linear layer keeps only its packed form. torch's packing of a tied output head on a
        CPU can't serve look-ups, so there the embedding exists a second time."""
        spec, width = self.spec, DTYPE_BYTES[self.dtype]
        if self.weight_bits is not None:
            return self._rounded_weights(self.weight_bits)
        twice = spec.tie_embeddings and self.device == "cpu" and not self.native_kernels
        head = spec.vocab_size * spec.hidden_size if twice else 0
        how = f"{spec.weight_count:,} parameters x {width} bytes ({self.dtype})"
        return MemoryItem(
            "weights", (spec.weight_count + head) * width, how + ", tied head packed" * bool(head)
        )

    def _rounded_weights(self, bits: float) -> MemoryItem:
        """An embedding of its own stays as it is; a tied one is read from the rounded head."""
        spec, width = self.spec, DTYPE_BYTES[self.dtype]
        head = spec.vocab_size * spec.hidden_size
        rest = spec.weight_count - spec.matrix_count - head
        size = int(spec.matrix_count * bits / 8) + head + rest * width
        return MemoryItem("weights", size, f"{spec.matrix_count:,} parameters x {bits:g} bits, 8 in the head")

    def kv_pool(self, num_pages: int) -> MemoryItem:
        tokens = num_pages * self.page_size
        return MemoryItem(
            "KV pool",
            num_pages * self.page_bytes,
            f"{tokens:,} tokens x {show(self.token_bytes)} ({self.kv_dtype})",
        )

    def working(self) -> tuple[MemoryItem, ...]:
        """The most that a step holds at once, what the rows keep, and the libraries."""
        spec, width = self.spec, DTYPE_BYTES[self.dtype]
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        # The block that holds most: the gated product (its halves again in float32) or attention's tiles.
        mlp = 2 * spec.intermediate_size * (width + 4)
        attention = (query + 2 * kv) * width + 2 * query * 4
        token = 2 * spec.hidden_size * width + max(mlp, attention)
        gathered = max(GATHERED_KEYS, self.max_context) * 2 * kv * (4 if width == 4 else 4 + width)
        group = spec.num_heads // spec.num_kv_heads
        masks = 4 * min(KEPT_MASKS, self.step_tokens * group * self.max_context)
        logits = self.max_running * spec.vocab_size * BYTES_PER_LOGIT
        if self.native_kernels:
            logits = (
                self.max_running * LOGIT_BYTES + self.threads * THREAD_BYTES_PER_LOGIT
            ) * spec.vocab_size
        rows = self.max_running * 4 * (self.max_context + 1 + -(-self.max_context // self.page_size))
        rope = self.max_context * 2 * spec.head_dim * 4
        reading = MemoryItem("attention", gathered + masks, "keys and values gathered for a call, and masks")
        if self.native_kernels:
            widest = 4 * max(spec.intermediate_size, spec.hidden_size, query)
            room = self.step_tokens * widest + KERNEL_BYTES
            reading = MemoryItem("kernels", room, "inputs of a product in float32, and threads' own")
        return (
            MemoryItem(
                "activations", self.step_tokens * token, f"{self.step_tokens:,} tokens x {show(token)}"
            ),
            reading,
            MemoryItem("sampling", logits, f"{self.max_running} rows x {spec.vocab_size:,} logits"),
            MemoryItem("rows", rows + rope, f"tokens and pages of {self.max_running} rows, rotary table"),
            MemoryItem("runtime", RUNTIME_BYTES[self.device], "Python, torch and its libraries"),
        )

    def plan(self, num_pages: int, available: int, total: int) -> MemoryPlan:
        items = (self.weights(), self.kv_pool(num_pages), *self.working())
        return MemoryPlan(device=self.device, items=items, available=available, total=total)
