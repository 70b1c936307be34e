"""Muon for the hidden matrices and AdamW for the rest, with states that go into safetensors."""

from __future__ import annotations

from concurrent.futures import Executor

import torch
from torch import Tensor, nn

_NS = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients that push singular values towards one


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately."""
    a, b, c = _NS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Optimiser:
    """Steps both groups; ``scale`` multiplies both learning rates."""

    def __init__(
        self, model: nn.Module, muon_lr: float = 0.008, adam_lr: float = 2e-3, decay: float = 0.1
    ) -> None:
        self.muon_lr, self.adam_lr, self.decay = muon_lr, adam_lr, decay
        self.params = dict(model.named_parameters())
        self.state: dict[str, Tensor] = {}
        self.count = 0
        for name, param in self.params.items():
            self.state["m." + name] = torch.zeros_like(param)
            if not self._hidden(name):
                self.state["v." + name] = torch.zeros_like(param)

    def _hidden(self, name: str) -> bool:
        return self.params[name].ndim == 2 and "embed" not in name

    @torch.no_grad()
    def _muon(self, name: str, scale: float) -> None:
        param, momentum = self.params[name], self.state["m." + name]
        momentum.lerp_(param.grad, 0.05)
        rows, columns = param.shape
        lr = self.muon_lr * scale
        update = orthogonalise(param.grad.lerp(momentum, 0.95))
        param.mul_(1 - lr * self.decay).sub_(update, alpha=lr * max(1.0, rows / columns) ** 0.5)

    @torch.no_grad()
    def step(self, scale: float, pool: Executor) -> None:
        """Update all parameters and clear their gradients; matrices are shared out over ``pool``."""
        self.count += 1
        list(pool.map(lambda name: self._muon(name, scale), filter(self._hidden, self.params)))
        for name, param in self.params.items():
            if not self._hidden(name):
                m, v = self.state["m." + name].lerp_(param.grad, 0.1), self.state["v." + name]
                v.mul_(0.98).addcmul_(param.grad, param.grad, value=0.02)
                denominator = (v / (1 - 0.98**self.count)).sqrt_().add_(1e-10)
                param.addcdiv_(m, denominator, value=-self.adam_lr * scale / (1 - 0.9**self.count))
        for param in self.params.values():
            param.grad = None
