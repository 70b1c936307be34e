"""Permanent rows: everything that a worker keeps about a running request, one row each, in columns.

A request holds its row from admission until it leaves; a step gathers from the columns by row number and
copies nothing between steps. Tokens live on the device, where the sampler appends to them, so that the next
step can be launched before the host has seen the last one's tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trunkline.layers.pooling import Pool
from trunkline.layers.sampler import RowSampling, row_sampling
from trunkline.scheduler.plan import Admit, PagesAt, TokensAt


class Rows:
    """Columns indexed by row. Raises ValueError for a plan that does not fit them (a scheduler's fault)."""

    def __init__(
        self,
        max_running: int,
        max_context: int,
        page_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        hidden_size: int,
    ) -> None:
        self.device = device
        self.hidden_size = hidden_size
        self.eos_token_ids = eos_token_ids
        self.max_context = max_context
        self.tokens = torch.zeros(max_running, max_context + 1, dtype=torch.int32, device=device)
        self.computed = np.zeros(max_running, np.int64)  # tokens whose KV exists after all launched steps
        self.page_table = np.zeros((max_running, -(-max_context // page_size)), np.int32)
        self.prompt_len = np.zeros(max_running, np.int64)
        self.prompt_logprobs_from: list[int | None] = [None] * max_running
        self.sampling: list[RowSampling | None] = [None] * max_running
        self.pools: list[Pool | None] = [None] * max_running

    def admit(self, admit: Admit) -> None:
        row, count = admit.row, len(admit.token_ids)
        if count > self.max_context:
            raise ValueError(f"row {row}: {count} tokens exceed max_context {self.max_context}")
        if admit.received:
            raise ValueError(
                f"row {row}: {admit.received} tokens of KV are to be received; no transfer exists"
            )
        self.tokens[row, :count] = torch.tensor(admit.token_ids, dtype=torch.int32, device=self.device)
        self.computed[row] = admit.computed
        self.prompt_len[row] = admit.prompt_len
        self.prompt_logprobs_from[row] = admit.prompt_logprobs_from
        self.sampling[row] = row_sampling(
            admit.params,
            admit.logprobs,
            admit.prompt_len,
            self.eos_token_ids,
            self.device,
            guided=admit.guided,
        )
        if admit.pooling is not None:
            self.pools[row] = Pool(admit.pooling, self.hidden_size, self.device)
        self.set_pages(PagesAt(row, 0, admit.pages))

    def set_pages(self, entry: PagesAt) -> None:
        end = entry.start + len(entry.pages)
        if end > self.page_table.shape[1]:
            raise ValueError(f"row {entry.row}: {end} pages exceed the table's {self.page_table.shape[1]}")
        self.page_table[entry.row, entry.start : end] = entry.pages

    def append(self, entry: TokensAt) -> None:
        """Tokens that the row gets without sampling them."""
        end = entry.start + len(entry.token_ids)
        if entry.start < self.computed[entry.row] or end > self.max_context:
            raise ValueError(f"row {entry.row}: tokens [{entry.start}, {end}) can't be appended")
        self.tokens[entry.row, entry.start : end] = torch.tensor(
            entry.token_ids, dtype=torch.int32, device=self.device
        )

    def retire(self, row: int) -> None:
        self.sampling[row] = None
        self.prompt_logprobs_from[row] = None
        self.pools[row] = None

    def live_sampling(self, row: int) -> RowSampling:
        """The row's sampling column. Raises ValueError for a row that no request holds."""
        found = self.sampling[row]
        if found is None:
            raise ValueError(f"row {row} holds no request")
        return found

    def gather_tokens(self, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Tokens int32 at (rows[i], positions[i])."""
        return self.tokens.view(-1).index_select(0, self._flat(rows, positions))

    def put_tokens(self, rows: np.ndarray, positions: np.ndarray, tokens: Tensor) -> None:
        self.tokens.view(-1).index_copy_(0, self._flat(rows, positions), tokens.int())

    def _flat(self, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        return torch.from_numpy(rows * self.tokens.shape[1] + positions).to(self.device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        return self.tokens.numel() * self.tokens.element_size() + self.page_table.nbytes
