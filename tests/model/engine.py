"""Drives the real scheduler, core and worker over a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.sim.grammar import ToyCompiler
from tests.sim.integers import EOS_IDS
from trunkline.cache import PrefixCache
from trunkline.config.model_spec import load_model_spec
from trunkline.config.schema import (
    CacheConfig,
    EngineConfig,
    GrammarConfig,
    KVType,
    ModelConfig,
    SchedulerConfig,
)
from trunkline.engine.core import EngineCore
from trunkline.engine.guidance import Guidance
from trunkline.messages import AddRequest, Outputs
from trunkline.scheduler.plan import Admit, RowStep, StepPlan
from trunkline.scheduler.scheduler import Scheduler
from trunkline.types import FinishReason, LogprobParams, Pooling, SamplingParams, TokenLogprobs
from trunkline.worker.runner import ModelWorker

MAX_STEPS = 5000


@dataclass
class Result:
    """All that a request got. Equality is to the bit: logprobs are floats, compared exactly."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: bytes = b""
    finish: FinishReason | None = None


def engine_config(
    path: Path,
    *,
    page_size: int = 16,
    num_pages: int = 64,
    prefix_cache: bool = True,
    jump_forward: bool = True,
    kv_dtype: KVType = "float32",
    **scheduler: object,
) -> EngineConfig:
    settings = {"max_running": 8, "max_context": 512, "prefill_wait": prefix_cache, **scheduler}
    return EngineConfig(
        model=ModelConfig(path=str(path)),
        cache=CacheConfig(
            page_size=page_size, num_pages=num_pages, prefix_cache=prefix_cache, kv_dtype=kv_dtype
        ),
        scheduler=SchedulerConfig(**settings),  # type: ignore[arg-type]
        grammar=GrammarConfig(jump_forward=jump_forward),
    )


def make_worker(config: EngineConfig) -> ModelWorker:
    """A worker whose unwritten KV is poisoned: reading any of it shows."""
    worker = ModelWorker(config, load_model_spec(config.model.path))
    data = worker.pool.data
    data[:, :-1] = -1 if data.dtype == torch.int8 else float("nan")  # -1, -1: a NaN for scale
    return worker


def make_core(config: EngineConfig, worker: ModelWorker | None = None) -> EngineCore:
    """Its grammars are those of `tests.sim.grammar`; their outputs end with EOS_IDS of there."""
    worker = worker or make_worker(config)
    cache = PrefixCache(config.cache.num_pages, config.cache.page_size, config.cache.prefix_cache)
    spec = worker.spec
    scheduler = Scheduler(
        config.scheduler,
        cache,
        (*spec.eos_token_ids, *EOS_IDS),
        spec.vocab_size,
        jump_forward=config.grammar.jump_forward,
    )
    guidance = Guidance(ToyCompiler(), EOS_IDS, spec.vocab_size)
    return EngineCore(scheduler, worker, config.scheduler.depth, guidance)


def run(core: EngineCore, requests: Sequence[AddRequest], gap: int = 0) -> dict[str, Result]:
    """Submit a request every `gap` steps (-1: when the one before has finished); run until all are done."""
    results = {request.rid: Result() for request in requests}
    waiting = list(requests)
    for step in range(MAX_STEPS):
        while waiting and (step % gap == 0 if gap > 0 else gap == 0 or not core.has_work):
            for reply in core.handle(waiting.pop(0)):
                assert isinstance(reply, Outputs)
                raise AssertionError(reply.items[0].finish)
            if gap:
                break
        if not waiting and not core.has_work:
            core.scheduler.check()
            return results
        for out in core.step():
            result = results[out.rid]
            assert result.finish is None
            result.tokens += out.token_ids
            result.logprobs += out.logprobs or []
            result.prompt_logprobs = out.prompt_logprobs or result.prompt_logprobs
            result.embedding, result.finish = out.embedding, out.finish
        core.scheduler.check()
    raise AssertionError(f"not done after {MAX_STEPS} steps")


def admit(
    token_ids: list[int],
    pages: list[int],
    *,
    row: int = 0,
    params: SamplingParams | None = None,
    computed: int = 0,
    logprobs: LogprobParams | None = None,
    prompt_logprobs_from: int | None = None,
    pooling: Pooling | None = None,
) -> Admit:
    return Admit(
        row=row,
        rid=f"row {row}",
        token_ids=token_ids,
        prompt_len=len(token_ids),
        computed=computed,
        pages=pages,
        params=params or SamplingParams(temperature=0.0),
        logprobs=logprobs,
        prompt_logprobs_from=prompt_logprobs_from,
        pooling=pooling,
    )


def plan(*rows: tuple[int, int, bool], admits: Sequence[Admit] = (), retires: Sequence[int] = ()) -> StepPlan:
    """A hand-written plan; rows are (row, q_len, samples)."""
    steps = [RowStep(row, q_len, 0, samples) for row, q_len, samples in rows]
    return StepPlan(step=0, retires=list(retires), admits=list(admits), rows=steps)
