"""Pooling: one vector for a text, from the hidden states of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.types import Pooling

_UNIT = 2.0**32  # states are summed in whole multiples of 1 / _UNIT
_ROOM = 2.0**30  # most that a sum may be: its multiples fit int64


class Pool:
    """Takes a text's hidden states [n, hidden] in pieces, wherever they are cut.

    The mean is a sum of integers: sums of integers do not depend on order or grouping, so neither chunks nor
    the device's way to add up change a bit of it.
    """

    def __init__(self, kind: Pooling, hidden: int, device: torch.device) -> None:
        self.kind = kind
        self._count = 0
        self._total = torch.zeros(hidden, dtype=torch.int64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._last: Tensor | None = None

    def add(self, states: Tensor) -> None:
        self._count += len(states)
        if self.kind == "last":
            self._last = states[-1].float()
            return
        wide = states.double()
        self._largest = torch.maximum(self._largest, wide.abs().max())
        self._total = self._total + (wide * _UNIT).round().long().sum(0)

    def result(self) -> Tensor:
        """[hidden] float32. Not finite where a state was not, or where the sum had no room."""
        if self._last is not None:
            return self._last
        mean = (self._total.double() / (_UNIT * self._count)).float()
        fits = self._largest * self._count < _ROOM  # false for NaN
        return torch.where(fits, mean, torch.nan)
