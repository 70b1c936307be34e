"""Training-only torch model of the Qwen3 architecture.

Parameter names equal those of ``transformers``' ``Qwen3ForCausalLM``, so a ``state_dict`` of this module is
the checkpoint. Everything is fp32; batches are right-padded, which a causal mask alone makes exact.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class SeedlingConfig:
    """Shape of the network; the defaults are those of the published checkpoint."""

    vocab_size: int = 1536
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of the fields, for JSON."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_tables(config: SeedlingConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of shape ``[length, head_dim]`` in the half-split layout."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] / config.rope_theta**exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to ``[batch, heads, tokens, head_dim]``."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class KVCache:
    """Keys and values of a right-padded batch; each row appends at its own length."""

    def __init__(self, lengths: Tensor, extra: int) -> None:
        self.lengths = lengths.clone()
        self.extra = extra
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def store_prompt(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a prompt's keys and values with room for the tokens to come."""
        self.layers[layer] = (F.pad(key, (0, 0, 0, self.extra)), F.pad(value, (0, 0, 0, self.extra)))

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write one token per row (overwriting padding) and return keys, values and the mask."""
        keys, values = self.layers[layer]
        rows = torch.arange(keys.shape[0])
        keys[rows, :, self.lengths] = key[:, :, 0]
        values[rows, :, self.lengths] = value[:, :, 0]
        visible = torch.arange(keys.shape[2])[None, :] <= self.lengths[:, None]
        return keys, values, visible[:, None, None, :]


class Attention(nn.Module):
    """Grouped-query attention with per-head RMSNorm on queries and keys."""

    def __init__(self, config: SeedlingConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, decode: bool) -> Tensor:
        batch, tokens, _ = x.shape
        dim = self.config.head_dim
        q = self.q_norm(self.q_proj(x).view(batch, tokens, -1, dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, tokens, -1, dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None and decode:
            k, v, mask = cache.append(self.layer, k, v)
        elif cache is not None:
            cache.store_prompt(self.layer, k, v)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not decode)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, config: SeedlingConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: SeedlingConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, decode: bool) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, decode)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, layers and final norm (the ``model.`` part of the checkpoint)."""

    def __init__(self, config: SeedlingConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Seedling(nn.Module):
    """Qwen3-architecture language model with tied embeddings."""

    def __init__(self, config: SeedlingConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        cos, sin = rope_tables(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal initialisation; residual outputs start at zero so that depth costs no stability."""
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("o_proj", "down_proj")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, decode: bool = False) -> Tensor:
        """Final hidden states of ``[batch, tokens]`` ids."""
        if decode:
            assert cache is not None
            cos, sin = self.cos[cache.lengths][:, None, None, :], self.sin[cache.lengths][:, None, None, :]
        else:
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x, cos, sin, cache, decode)
        if decode:
            cache.lengths += 1
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary through the tied embedding."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, eos: set[int]) -> list[list[int]]:
        """Greedy continuation of each prompt, without the end token."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        cache = KVCache(lengths, max_new_tokens)
        hidden = self.hidden(ids, cache)[torch.arange(len(prompts)), lengths - 1]
        outputs: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            token = self.logits(hidden).argmax(-1)
            for row in list(open_rows):
                if int(token[row]) in eos:
                    open_rows.discard(row)
                else:
                    outputs[row].append(int(token[row]))
            if not open_rows:
                break
            hidden = self.hidden(token[:, None], cache, decode=True)[:, 0]
        return outputs
