"""Workers that are slow or break, put around a real one: only a test that builds the core can reach them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from trunkline.config.schema import EngineConfig
from trunkline.engine import process
from trunkline.engine.core import EngineCore, Worker
from trunkline.messages import Ready
from trunkline.scheduler.plan import Masks, StepPlan


@dataclass
class Faults:
    """What goes wrong: `breaks` maps the number of a step with rows to the call that raises in it."""

    delay: float = 0.0  # seconds that each step takes longer
    breaks: dict[int, str] = field(default_factory=dict)
    steps: int = 0
    broken: int = 0
    cores: list[EngineCore] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on, cores in threads of this process get these faults."""
        build = process.build_core

        def with_faults(config: EngineConfig) -> tuple[EngineCore, Ready]:
            core, ready = build(config)
            core.worker = FaultyWorker(core.worker, self)
            self.cores.append(core)
            return core, ready

        monkeypatch.setattr(process, "build_core", with_faults)


class FaultyWorker:
    """A worker that does what `faults` says, and otherwise what the real one does."""

    def __init__(self, worker: Worker, faults: Faults) -> None:
        self.needs_host_seq_lens = worker.needs_host_seq_lens
        self._worker = worker
        self._faults = faults

    def forward(self, plan: StepPlan) -> Any:
        if plan.rows:
            time.sleep(self._faults.delay)
            self._faults.steps += 1
        step = self._worker.forward(plan)  # rows and pages must be known, whatever breaks
        self._break("forward")
        return step

    def sample(self, step: Any, masks: Masks | None) -> Any:
        pending = self._worker.sample(step, masks)
        self._break("sample")
        return _Pending(pending.result, self._break)

    def _break(self, where: str) -> None:
        if self._faults.breaks.get(self._faults.steps) == where:
            del self._faults.breaks[self._faults.steps]
            self._faults.broken += 1
            raise RuntimeError(f"planted in {where}")


@dataclass
class _Pending:
    read: Callable[[], Any]
    check: Callable[[str], None]

    def result(self) -> Any:
        found = self.read()
        self.check("result")
        return found
