"""From a step plan and the rows to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trunkline.scheduler.plan import RowStep
from trunkline.worker.rows import Rows


@dataclass(frozen=True)
class BatchShape:
    """Host integers that a kernel, or a captured graph, is chosen by."""

    num_reqs: int
    num_tokens: int
    max_q_len: int
    uniform_q_len: int | None  # the q_len that all rows share
    max_seq_len_bound: int


@dataclass(frozen=True)
class ForwardBatch:
    """One forward pass: T tokens of R requests, one request after another. Never changed once built."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    q_start: Tensor  # [R + 1] int32: where each request's tokens begin
    seq_lens: Tensor  # [R] int32: KV length including this step's tokens
    row_ids: Tensor  # [R] int32
    page_table: Tensor  # [R, pages] int32
    slot_mapping: Tensor  # [T] int64: where each token's KV goes
    logits_idx: Tensor  # [S] int64: tokens whose logits are wanted
    tree_mask: Tensor | None  # [T, M] bool, where rows are draft trees: see `plan_attention`
    input_embeds: Tensor | None  # [T, hidden] in place of token_ids
    shape: BatchShape


def build_batch(steps: Sequence[RowStep], rows: Rows, page_size: int) -> ForwardBatch:
    """Gather the step's columns. Reads the rows, changes nothing.

    Raises ValueError where a row would outgrow its context (a scheduler's fault).
    """
    row_ids = np.array([step.row for step in steps], np.int64)
    q_lens = np.array([step.q_len for step in steps], np.int64)
    before = rows.computed[row_ids]
    seq_lens = before + q_lens
    longest = int(seq_lens.max())
    if q_lens.min() < 1 or longest > rows.max_context:
        raise ValueError(f"q_len {q_lens.tolist()} after {before.tolist()} computed tokens can't be run")
    q_start = np.zeros(len(steps) + 1, np.int64)
    np.cumsum(q_lens, out=q_start[1:])
    row_of_token = np.repeat(row_ids, q_lens)
    positions = np.arange(q_start[-1]) + np.repeat(before - q_start[:-1], q_lens)
    pages = rows.page_table[row_ids, : -(-longest // page_size)]
    slots = (
        rows.page_table[row_of_token, positions // page_size] * np.int64(page_size) + positions % page_size
    )
    samples = np.array([step.samples for step in steps], bool)
    first_len = int(q_lens[0])

    def send(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(rows.device, non_blocking=True)

    return ForwardBatch(
        token_ids=rows.gather_tokens(row_of_token, positions),
        positions=send(positions),
        q_start=send(q_start.astype(np.int32)),
        seq_lens=send(seq_lens.astype(np.int32)),
        row_ids=send(row_ids.astype(np.int32)),
        page_table=send(pages),
        slot_mapping=send(slots),
        logits_idx=send(q_start[1:][samples] - 1),
        tree_mask=None,
        input_embeds=None,
        shape=BatchShape(
            num_reqs=len(steps),
            num_tokens=int(q_start[-1]),
            max_q_len=int(q_lens.max()),
            uniform_q_len=first_len if bool((q_lens == first_len).all()) else None,
            max_seq_len_bound=longest,
        ),
    )
