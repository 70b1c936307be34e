"""The dense decoder: blocks that all architectures are composed of.

A model is a function of its arguments: token ids, positions and the step's attention go in, hidden states
come out. It holds weights and no state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from trunkline.attention.backend import AttentionBackend
from trunkline.config.model_spec import ModelSpec
from trunkline.kernels.ops import Choices, Kernels, LayerStack, LayerWeights, Quantization, TokenMasks
from trunkline.layers.embedding import Embedding, OutputHead
from trunkline.layers.linear import GatedLinear, Linear
from trunkline.layers.norm import RMSNorm
from trunkline.layers.rope import RopeTable
from trunkline.models.weights import Checkpoint, LayerLoader

Attend = Callable[[int, Tensor, Tensor], Tensor]  # (layer, q [T, H, D], kv [T, 2, K, D]) -> [T, H, D]


class Batch(Protocol):
    """The part of a worker's ForwardBatch that a model reads."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...


class Attention:
    """Grouped-query attention with rotary positions; `head_gain` [heads, D]: of an RMS norm of q and k."""

    def __init__(
        self, spec: ModelSpec, kernels: Kernels, qkv: Linear, output: Linear, head_gain: Tensor | None
    ) -> None:
        self.heads = spec.num_heads
        self.rotated = spec.num_heads + spec.num_kv_heads  # heads of q and k, which lie side by side
        self.kv_shape = (2, spec.num_kv_heads, spec.head_dim)
        self.head_dim = spec.head_dim
        self.eps = spec.rms_norm_eps
        self.qkv = qkv
        self.output = output
        self.head_gain = head_gain
        self._rope = kernels.rope

    def __call__(self, x: Tensor, residual: Tensor, layer: int, rope: Tensor, attend: Attend) -> Tensor:
        tokens = x.shape[0]
        heads = self.qkv(x).view(tokens, -1, self.head_dim)
        self._rope(heads[:, : self.rotated], rope, self.head_gain, self.eps)
        kv = heads[:, self.heads :].view(tokens, *self.kv_shape)
        return self.output(attend(layer, heads[:, : self.heads], kv).view(tokens, -1), residual)


class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, gate_up: GatedLinear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(self.gate_up(x), residual)


class DecoderLayer:
    """Pre-norm residual block."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(self, x: Tensor, layer: int, rope: Tensor, attend: Attend) -> Tensor:
        x = self.attention(self.input_norm(x), x, layer, rope, attend)
        return self.mlp(self.mlp_norm(x), x)

    def weights(self) -> LayerWeights:
        """The same as data."""
        return LayerWeights(
            self.input_norm.weight,
            self.mlp_norm.weight,
            self.attention.qkv.packed,
            self.attention.head_gain,
            self.attention.output.packed,
            self.mlp.gate_up.packed,
            self.mlp.down.packed,
        )


class DecoderModel:
    """Embedding, layers, final norm, output head."""

    def __init__(
        self,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: OutputHead,
        rope: RopeTable,
        stack: LayerStack | None,
        map_s: float = 0.0,
        pack_s: float = 0.0,
    ) -> None:
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.rope = rope
        self.stack = stack  # the same layers, as one call
        self.map_s, self.pack_s = (
            map_s,
            pack_s,
        )  # seconds that it took to open the files, and to read and pack

    def forward(self, batch: Batch, backend: AttentionBackend, metadata: Any) -> Tensor:
        """Hidden states [T, hidden] after the last layer, before the final norm."""
        x = self.embedding(batch.token_ids)
        rope = self.rope(batch.positions)
        whole = backend.whole(metadata)
        if self.stack is not None and whole is not None:
            return self.stack(x, rope, *whole)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            return backend.run(metadata, layer, q, kv)

        for index, layer in enumerate(self.layers):
            x = layer(x, index, rope, attend)
        return x

    def states(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> the same after the final norm, as pooling takes it."""
        return self.norm(hidden)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, hidden] -> [n, vocabulary] float32, in `out` if there is one."""
        return self.head(self.norm(hidden), out)

    def top(
        self, hidden: Tensor, masks: TokenMasks | None = None, choices: Choices | None = None
    ) -> tuple[Tensor, Tensor]:
        """[n, hidden] -> a token for each row [n] int64, the likeliest without choices, and whether it is
        usable [n] bool."""
        return self.head.top(self.norm(hidden), masks, choices)

    @property
    def nbytes(self) -> int:
        """Of the embedding and all products; norms are too small to count."""
        parts: list[Embedding | Linear | GatedLinear] = [self.embedding, self.head.linear]
        for layer in self.layers:
            parts += [layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down]
        return sum(part.nbytes for part in parts)


def dense_layer(
    load: LayerLoader,
    spec: ModelSpec,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_norm: bool = False,
) -> DecoderLayer:
    """The block that Llama introduced, with what other architectures add to it."""
    hidden, dim, eps = spec.hidden_size, spec.head_dim, spec.rms_norm_eps
    query, kv, inner = spec.num_heads * dim, spec.num_kv_heads * dim, spec.intermediate_size
    attn, mlp = load.at("self_attn"), load.at("mlp")
    gain = None
    if head_norm:
        gains = [attn.tensor("q_norm.weight", dim)] * spec.num_heads
        gains += [attn.tensor("k_norm.weight", dim)] * spec.num_kv_heads
        gain = torch.stack(gains)
    attention = Attention(
        spec,
        load.kernels,
        attn.linear({"q_proj": query, "k_proj": kv, "v_proj": kv}, hidden, bias=qkv_bias),
        attn.linear({"o_proj": hidden}, query, bias=output_bias),
        gain,
    )
    gated = GatedMLP(
        mlp.gated("gate_proj", "up_proj", inner, hidden, spec.activation, bias=mlp_bias),
        mlp.linear({"down_proj": hidden}, inner, bias=mlp_bias),
    )
    return DecoderLayer(
        load.norm("input_layernorm", hidden, eps),
        attention,
        load.norm("post_attention_layernorm", hidden, eps),
        gated,
    )


def load_decoder(
    spec: ModelSpec,
    layer: Callable[[LayerLoader, ModelSpec], DecoderLayer],
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
    quantization: Quantization | None = None,
) -> DecoderModel:
    """Load the model of `spec.path`, whose blocks `layer` builds. Raises ModelError."""
    began = time.perf_counter()
    checkpoint = Checkpoint(spec.path)
    mapped = time.perf_counter()
    load = LayerLoader(checkpoint, kernels, dtype, device, quantization)
    size = (spec.vocab_size, spec.hidden_size)
    if spec.tie_embeddings:
        checkpoint.skip("lm_head.weight")
        table = load.mapped("model.embed_tokens.weight", *size)
        head = OutputHead(kernels, table, quantization)
        embedding = Embedding(kernels, table, head)
        if embedding.table is table:  # look-ups need a copy of their own
            embedding = Embedding(kernels, table.clone(), head)
    else:
        head = OutputHead(kernels, load.mapped("lm_head.weight", *size), quantization)
        embedding = Embedding(kernels, load.tensor("model.embed_tokens.weight", *size), None)
    checkpoint.release()
    layers = []
    for index in range(spec.num_layers):
        checkpoint.skip(f"model.layers.{index}.self_attn.rotary_emb.inv_freq")  # saved by old versions
        layers.append(layer(load.at(f"model.layers.{index}"), spec))
        checkpoint.release()
    norm = load.norm("model.norm", spec.hidden_size, spec.rms_norm_eps)
    checkpoint.finish()
    weights = [layer.weights() for layer in layers]
    stack = kernels.layer_stack(weights, spec.num_heads, spec.num_kv_heads, spec.rms_norm_eps)
    rope = RopeTable(spec, max_context, device)
    took = (mapped - began, time.perf_counter() - mapped)
    return DecoderModel(embedding, layers, norm, head, rope, stack, *took)
