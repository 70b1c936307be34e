"""Starts the network with a circuit that copies, instead of waiting for training to find it.

Nearly every task looks up what was written after an earlier occurrence of the current token. That takes two
attention layers that only make sense together, which gradient descent finds late. Here they are written down:

* layer 0, head 0 attends to the previous token (a constant query and key whose rotary phases differ by one$
  step) and writes its identity next to the current one;
* layer 1, heads 0 and 2 compare the current token with those previous tokens and copy the token found.

All other weights keep their random start and everything stays trainable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import words
from .model import Attention, Seedling

_NOISE = 0.01


def _ranges(hidden: int) -> tuple[slice, slice, slice]:
    """Residual coordinates of a token's identity, of the previous one, and of the rest of the identity."""
    return slice(1, 65), slice(65, 129), slice(129, hidden)


def _previous_token(attention: Attention, frequencies: Tensor, hidden: int) -> None:
    """Head 0 looks one token back and writes that token's identity."""
    own, previous, _ = _ranges(hidden)
    half = frequencies.shape[0]
    weight = torch.zeros(half)
    weight[:7] = torch.tensor([1.0, 1.0, 0.9, 0.8, 0.6, 0.5, 0.4])
    query, key = torch.zeros(2 * half), torch.zeros(2 * half)
    key[:half] = weight
    query[:half], query[half:] = weight * frequencies.cos(), -weight * frequencies.sin()
    attention.q_proj.weight[: 2 * half].normal_(std=_NOISE)
    attention.k_proj.weight[: 2 * half].normal_(std=_NOISE)
    attention.q_proj.weight[: 2 * half, 0] = query / query.norm()
    attention.k_proj.weight[: 2 * half, 0] = key / key.norm()
    for gain in (attention.q_norm.weight, attention.k_norm.weight):
        gain[:7] = gain[half : half + 7] = 1.8
    attention.v_proj.weight[:64].normal_(std=_NOISE)
    attention.v_proj.weight[:64, own] = torch.eye(64)
    attention.o_proj.weight[previous, :64] = 0.1 * torch.eye(64)


def _copy(attention: Attention, hidden: int) -> None:
    """Heads 0 and 2 find where the current token was the previous one, and copy what stands there."""
    own, previous, rest = _ranges(hidden)
    match = torch.ones(64)
    match[:10], match[32:42] = 0.0, 0.0  # these rotate too fast to compare tokens far apart
    match[10:16], match[42:48] = 0.5, 0.5
    for head, group, content in ((0, 0, own), (2, 1, rest)):
        rows, shared = slice(64 * head, 64 * head + 64), slice(64 * group, 64 * group + 64)
        attention.q_proj.weight[rows].normal_(std=_NOISE)
        attention.k_proj.weight[shared].normal_(std=_NOISE)
        attention.v_proj.weight[shared].normal_(std=_NOISE)
        attention.q_proj.weight[rows, own] += torch.diag(match)
        attention.k_proj.weight[shared, previous] += torch.diag(match)
        width = content.stop - content.start
        attention.v_proj.weight[shared, content][:width] += torch.eye(width)
        attention.o_proj.weight[content, rows.start : rows.start + width] = 0.32 * torch.eye(width)
    attention.q_norm.weight.fill_(1.3)
    attention.k_norm.weight.fill_(1.3)


@torch.no_grad()
def install(model: Seedling, tokens: list[str]) -> None:
    """Write the circuit into a freshly initialised model; ``tokens`` are the texts of the vocabulary.

    A word with and without its leading space start out related, since one is often copied as the other.
    """
    config = model.config
    hidden = config.hidden_size
    own, previous, rest = _ranges(hidden)
    table = model.model.embed_tokens.weight
    table[:, 0] = 0.6  # the constant that the first head's query and key are made of
    table[:, own].normal_(std=0.1)
    table[:, rest].normal_(std=0.1)
    table[:, previous].normal_(std=0.024)
    index = {token: number for number, token in enumerate(tokens)}
    for token, number in index.items():
        bare = index.get(token.removeprefix(" "))
        if token.startswith(" ") and bare is not None:
            table[number] = 0.7 * table[number] + 0.7 * table[bare]
            table[number, 0] = table[bare, 0]
    for group in [*(words.CATEGORIES[name] for name in words.CLASSES), words.GOOD, words.BAD]:
        shared = torch.zeros(hidden).normal_(std=0.06)  # words of a kind start out alike
        shared[0] = 0.0
        for token in group:
            if " " + token in index:
                table[index[" " + token]] += shared
    steps = torch.arange(config.head_dim // 2) * 2.0 / config.head_dim
    _previous_token(model.model.layers[0].self_attn, config.rope_theta**-steps, hidden)
    _copy(model.model.layers[1].self_attn, hidden)
    model.model.norm.weight.fill_(0.5)
