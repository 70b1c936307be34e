"""The contract of all kernels: what each op computes, on which shapes, and what it must not depend on.

Batch invariance: the bits of a token's result depend on that token's own inputs and on its position, never on
how many other tokens share the call, on chunk boundaries, on the page size, on which pages hold its keys, or
on how many threads run. `tests/kernels` asserts it with `torch.equal`. On a CUDA device the plain-torch
implementation computes the same function, but cuBLAS may choose its summation order by the number of rows.

Notation: T tokens of all requests of a step, one after another; R requests; H query heads, K key/value heads,
G = H / K, D the size of a head. Activations are float32 or bfloat16; sums are kept in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantization:
    """Weights as whole numbers, rounded when they are packed; the activations that meet them are rounded too.

    8 bits: -127..127, one scale for each output. 4 bits: -8..7, one float16 scale for each output and `group`
    inputs, set so that the number of the largest magnitude becomes -8. Activations: -127..127 by the largest
    magnitude of their row (8 bits) or of their row's group (4 bits). Sums of products are exact.
    """

    bits: Literal[8, 4]
    group: int = 0  # inputs, a multiple of 8; 0 with 8 bits


Activation = Literal[
    "silu", "gelu", "gelu_tanh"
]  # of a gate; gelu is x * Phi(x), or its approximation by tanh


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer's weight in the layout its kernel wants. `data`, `scales` and `bias` are opaque."""

    data: Any
    bias: Tensor | None
    in_features: int
    out_features: int  # columns of the result
    nbytes: int  # of the weight
    gated: bool = False  # made by `pack_gated`
    quantization: Quantization | None = None
    scales: Tensor | None = None  # where they are not a part of `data`
    activation: Activation = "silu"  # of the gate

    @property
    def gate_number(self) -> int:
        """0: not gated; else 1 and the place in `Activation`."""
        return 1 + get_args(Activation).index(self.activation) if self.gated else 0


@dataclass(frozen=True)
class TokenMasks:
    """What some rows may choose: row `at[i]`, rising, the columns c whose bit (c & 31) of `words[i, c >> 5]`
    is 1 (int32, on the host). At least one bit of each is set."""

    at: Sequence[int]
    words: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Adjustment:
    """What changes the logits of a row before the choice, in this order, in float32."""

    row: int
    history: Tensor  # int32 [L]: the tokens before the new one
    prompt_len: int  # so many of them are the prompt
    repetition: float  # of tokens in the history positive logits are divided by it, others multiplied; 1: not
    frequency: float  # taken off for each occurrence of a token in the output
    presence: float  # taken off a token that occurs in the output
    bias_ids: Tensor  # int64: to these are added
    bias_values: Tensor  # float32
    banned: Tensor  # int64: become -inf, unless the row has a mask


WEIGHT_BITS = 35
MOST_KEPT = 128  # candidates of a row that `Kernels.top` finds without all logits


@dataclass(frozen=True)
class Choices:
    """How to choose a column in each of n rows of logits. Columns [n], on the host.

    After adjustments and masks (-inf), each column weighs w = 2^((logit - largest) * sharpness) times 2^35,
    rounded to a whole number: differences, products and the polynomial for powers round to float32 once each,
    so that w is the same everywhere, and sums of w are exact. Filters judge all columns, in order of logit
    and then of index: kept are the first `top_k`, those with no more than `top_p` of the weight of all ahead
    of them, and those that weigh at least `min_p` of the largest. Of the kept, in order of index, the one in
    which the running sum passes `u` times their sum is chosen. A column that weighs nothing (less than
    2^-36 of the largest) never is.
    """

    sharpness: Tensor  # float32: log2(e) / temperature; 0: the largest, of equals the first
    top_k: Tensor  # int64; 0 or less: all
    top_p: Tensor  # float64; 1 or more: all
    min_p: Tensor  # float64
    u: Tensor  # float64, in [0, 1)
    adjustments: Sequence[Adjustment] = ()

    def rows(self, at: Tensor) -> Choices:
        """Those of some rows, which have no adjustments."""
        return Choices(self.sharpness[at], self.top_k[at], self.top_p[at], self.min_p[at], self.u[at])

    @property
    def filters(self) -> Tensor:
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


@dataclass(frozen=True)
class LayerWeights:
    """A dense decoder layer as data, for a kernel set that runs layers whole."""

    input_norm: Tensor  # [hidden], as `mlp_norm`
    mlp_norm: Tensor
    qkv: PackedLinear
    head_gain: Tensor | None  # [H + K, D]: of an RMS norm of each query and key head
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear


class LayerStack(Protocol):
    def __call__(self, x: Tensor, rope: Tensor, slots: Tensor, pool: Tensor, plans: Sequence[Any]) -> Tensor:
        """Run all layers on x [T, hidden], which is used up, as the ops would one by one, to the bit.

        `pool` [layers, *pool_size(shape, dtype)]; `plans`: one for each layer."""
        ...


@dataclass(frozen=True)
class PagedShape:
    """What attention must know about the KV pool and the heads, fixed for an engine's life."""

    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    page_size: int  # tokens
    num_slots: int  # num_pages * page_size; the pool has one page more, whose first slot always holds zeros
    scale: float | None = None  # of scores; None: D ** -0.5
    soft_cap: float = 0.0  # scaled scores s become soft_cap * tanh(s / soft_cap); 0: they stay

    @property
    def score_scale(self) -> float:
        return float(self.head_dim**-0.5) if self.scale is None else self.scale


def head_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a head in a KV pool. int8: D whole numbers (-127..127 by the largest magnitude of the head)
    and their scale, the two bytes of a bfloat16; NaN where a number was not finite."""
    return head_dim + 2 * (dtype == torch.int8)


def pool_size(shape: PagedShape, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Of one layer's KV pool [num_pages + 1, keys and values, K, page_size, head_width]: a head's tokens of a
    page lie side by side, so that reading them is one stream."""
    pages = shape.num_slots // shape.page_size + 1
    return pages, 2, shape.num_kv_heads, shape.page_size, head_width(shape.head_dim, dtype)


def by_token(pool: Tensor) -> Tensor:
    """A view [..., pages, page_size, 2, K, width] of a pool [..., pages, 2, K, page_size, width]."""
    return pool.movedim(-2, -4)


class Kernels(Protocol):
    """The ops. A module that has these functions is an implementation."""

    def supports_linear(self, dtype: Any, device: Any) -> bool:
        """Whether `pack_linear` can serve this dtype there."""
        ...

    def pack_linear(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        quantization: Quantization | None = None,
    ) -> PackedLinear:
        """Pack weights [out_i, in] joined along `out`, with as many biases or none; then both may go.

        Raises ValueError for a weight that is not finite if it must be rounded."""
        ...

    def pack_gated(
        self,
        gate: Tensor,
        up: Tensor,
        biases: Sequence[Tensor],
        quantization: Quantization | None = None,
        activation: Activation = "silu",
    ) -> PackedLinear:
        """Pack two weights [out, in] for `gated_linear`; biases are those of both, or none."""
        ...

    def linear(
        self,
        x: Tensor,
        packed: PackedLinear,
        residual: Tensor | None = None,
        wide: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """[T, in] -> [T, out]: x @ weight.T + bias + residual; in float32 if `wide`, else in x's dtype.
        Written to `out` if there is one."""
        ...

    def gated_linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """[T, in] -> [T, out]: activation(x @ gate.T) * (x @ up.T), with the biases of both."""
        ...

    def top(
        self,
        x: Tensor,
        packed: PackedLinear,
        masks: TokenMasks | None = None,
        choices: Choices | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`choose(linear(x, packed, wide=True), choices, masks)`, where the product is not kept: each row
        wants the largest (all do without choices) or has a `top_k` of 1 to `MOST_KEPT`; nothing
        is adjusted. No bias."""
        ...

    def choose(
        self, logits: Tensor, choices: Choices, masks: TokenMasks | None = None
    ) -> tuple[Tensor, Tensor]:
        """A column for each row of float32 logits [n, columns], which stay as they are -> [n] int64, and
        whether it is usable [n] bool: not where a logit is not finite, or where none may be chosen. At most
        2^18 columns."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension; `weight` broadcasts against x."""
        ...

    def rope(self, x: Tensor, table: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> None:
        """Rotate heads [T, n, D] in place, after an RMS norm of each head if there is a `gain` [n or 1, D].

        `table` [T, 2, D] float32 holds each token's cosines and its sines, the first half of the sines
        negated (half-split layout)."""
        ...

    def embedding_table(self, weight: Tensor, head: PackedLinear | None) -> Any:
        """What `embedding` looks rows up in, of `weight`'s dtype. `head` is the output head if `weight`
        [vocabulary, hidden] is packed there already: then a kernel set that can read it needs no second copy
        (and look-ups are as rounded as the head)."""
        ...

    def embedding(self, token_ids: Tensor, table: Any) -> Tensor:
        """Rows of the embedding for ids [T], int32 or int64."""
        ...

    def store_kv(self, pool: Tensor, slots: Tensor, kv: Tensor) -> None:
        """Write kv [T, 2, K, D] to `slots` [T] int64 (page * page_size + offset) of one layer's pool, of
        `pool_size`, in its dtype: float32, bfloat16 or int8."""
        ...

    def layer_stack(
        self, layers: Sequence[LayerWeights], heads: int, kv_heads: int, eps: float
    ) -> LayerStack | None:
        """All layers as one call, if this kernel set has that."""
        ...

    def plan_attention(
        self,
        q_start: Tensor,
        seq_lens: Tensor,
        page_table: Tensor,
        window: int | None,
        shape: PagedShape,
        tree_mask: Tensor | None = None,
    ) -> Any:
        """Whatever `attention` needs to know about a step beyond its tensors; made once, used by all layers.

        q_start [R + 1] int32: where each request's tokens begin in T; seq_lens [R] int32: KV length including
        this step's tokens, which are the last ones; page_table [R, pages] int32. `window`: a query sees that
        many keys, its own included.

        tree_mask [T, M] bool is for requests whose tokens of this step are a draft tree, parents before
        children: token t sees token j of its request's step where tree_mask[t, j], itself included, and
        nothing after itself. It has the bits that it would have if those it sees came one after another,
        at the positions behind the prefix, and were all there is (windows count such positions too). A
        request with more than M tokens in the step is no tree. Raises ValueError for other masks.
        """
        ...

    def attention(self, q: Tensor, pool: Tensor, plan: Any) -> Tensor:
        """Causal attention of q [T, H, D] over the paged keys and values of each request -> [T, H, D].

        Query head h reads key/value head h // G. Slots that no token of the request was written to are never
        read.
        """
        ...
