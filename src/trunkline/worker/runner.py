"""The worker: applies step plans to its rows, runs the model, samples."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from trunkline.attention.backend import KVPool, PagedBackend
from trunkline.config.model_spec import ModelError, ModelSpec
from trunkline.config.schema import EngineConfig, ModelConfig
from trunkline.kernels import describe, load_kernels
from trunkline.kernels.ops import PagedShape, Quantization, TokenMasks
from trunkline.layers.logprobs import Logprobs, logprobs_of
from trunkline.layers.sampler import choices_of
from trunkline.models.registry import load_model
from trunkline.scheduler.plan import Masks, RowOutput, RowStep, StepOutput, StepPlan
from trunkline.types import TokenLogprobs
from trunkline.worker.batch import ForwardBatch, build_batch
from trunkline.worker.rows import Rows

log = logging.getLogger(__name__)

_PROMPT_LOGITS = 1 << 23  # most logits of prompt positions held at once (float32: 32 MiB)
NON_FINITE = "the model's output is not a finite number for this request, or every token is banned"


@dataclass(frozen=True)
class Step:
    """A launched forward pass. `logits` [S, vocabulary] float32 of the sampling rows, in plan order, until
    the next step. Where no row needs all of them, `last` are the hidden states [S, hidden] that tokens are
    found from, once masks are there; where only the likeliest are wanted and no masks come, `top` has those
    [S] int64 and whether logits are finite [S]."""

    plan: StepPlan
    batch: ForwardBatch | None = None  # None: the plan had no rows
    hidden: Tensor | None = None  # [T, hidden], kept only while prompt logprobs or vectors are wanted
    logits: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    last: Tensor | None = None


@dataclass(frozen=True)
class _RowResult:
    """What `sample` computed for one row of the plan, still on the device."""

    index: int | None  # among the sampling rows; None: a chunk that does not sample
    logprobs: Logprobs | None
    prompt: list[Logprobs] | None
    vector: Tensor | None = None  # [hidden] float32


class SampledStep:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor, usable: Tensor, rows: list[_RowResult]) -> None:
        self._rows = rows
        self._ready = None
        self._host = torch.stack((tokens, usable.long()))
        if tokens.device.type == "cuda":
            self._host = self._host.to("cpu", non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def result(self) -> StepOutput:
        """Wait for the tokens. One output for each row of the plan."""
        if self._ready is not None:
            self._ready.synchronize()
        tokens, usable = self._host.tolist()
        return StepOutput([self._output(row, tokens, usable) for row in self._rows])

    def _output(self, row: _RowResult, tokens: list[int], usable: list[int]) -> RowOutput:
        prompt: list[TokenLogprobs] | None = None
        if row.prompt is not None:
            prompt = [entry for part in row.prompt for entry in part.to_host()]
            if any(entry.logprob is None or not math.isfinite(entry.logprob) for entry in prompt):
                return RowOutput([], error=NON_FINITE)
        if row.index is None:
            return RowOutput([], None, prompt)
        if not usable[row.index] and row.vector is None:
            return RowOutput([], error=NON_FINITE)
        logprobs = None if row.logprobs is None else row.logprobs.to_host()
        embedding = b""
        if row.vector is not None:
            vector = row.vector.cpu().numpy()
            if not np.isfinite(vector).all():
                return RowOutput([], error=NON_FINITE)
            embedding = vector.astype("<f4").tobytes()
        return RowOutput([tokens[row.index]], logprobs, prompt, embedding)


def _quantization(config: ModelConfig) -> Quantization | None:
    if config.quantization == "plain":
        return None
    return Quantization(8) if config.quantization == "int8" else Quantization(4, config.quantization_group)


class ModelWorker:
    """Owns the weights, the KV pool and the rows. Plans must be applied in order, each exactly once.

    Raises ModelError (checkpoint, dtype) when it is made.
    """

    needs_host_seq_lens = False  # rows know their lengths without the host

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        scheduler, cache = config.scheduler, config.cache
        self.spec = spec
        self.device = torch.device(config.model.device)
        self.page_size = cache.page_size
        if self.device.type == "cpu":
            torch.set_num_threads(config.model.threads)
        kernels = self.kernels = load_kernels(self.device)
        log.info("kernels on %s: %s", self.device, describe(kernels))
        dtype = getattr(torch, config.model.dtype)
        if not kernels.supports_linear(dtype, self.device):
            raise ModelError(f"this CPU can't compute in {config.model.dtype}: use --dtype float32", "dtype")
        with torch.inference_mode():
            self.model = load_model(
                spec, kernels, dtype, self.device, scheduler.max_context, _quantization(config.model)
            )
        shape = PagedShape(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            cache.page_size,
            cache.num_tokens,
            spec.attention_scale,
            spec.attention_soft_cap,
        )
        self.pool = KVPool(spec.num_layers, shape, getattr(torch, cache.kv_dtype), self.device)
        self.backend = PagedBackend(kernels, self.pool, spec.layer_windows)
        self._logits = torch.empty(0, spec.vocab_size, device=self.device)
        self.rows = Rows(
            scheduler.max_running,
            scheduler.max_context,
            cache.page_size,
            spec.eos_token_ids,
            self.device,
            spec.hidden_size,
        )

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Step:
        """Apply the plan's changes and run its rows up to the logits."""
        for row in plan.retires:
            self.rows.retire(row)
        for admit in plan.admits:
            self.rows.admit(admit)
        for entry in plan.new_pages:
            self.rows.set_pages(entry)
        for tokens in plan.appends:
            self.rows.append(tokens)
        self.pool.reach(
            max(chain(*(a.pages for a in plan.admits), *(p.pages for p in plan.new_pages)), default=-1)
        )
        if not plan.rows:
            return Step(plan)
        if any(step.num_drafts for step in plan.rows):
            raise ValueError("the plan has draft tokens, but this worker has no drafter")
        batch = build_batch(plan.rows, self.rows, self.page_size)
        for step in plan.rows:
            self.rows.computed[step.row] += step.q_len
        hidden = self.model.forward(batch, self.backend, self.backend.plan(batch))
        logits, top, waiting = None, None, None
        ending = [step.row for step in plan.rows if step.samples]
        sampling = [self.rows.live_sampling(row) for row in ending]
        if ending and all(self.rows.pools[row] is not None for row in ending):  # nobody reads their tokens
            nothing = torch.zeros(len(ending), dtype=torch.int64, device=self.device)
            top = nothing, nothing == 0
        elif ending:
            last = hidden.index_select(0, batch.logits_idx)
            if any(row.needs_logits for row in sampling):
                logits = self.model.logits(last, self._logits_of(len(last)))
            elif all(row.greedy and not row.guided for row in sampling):
                top = self.model.top(last)
            else:
                waiting = last
        keep = any(
            self.rows.prompt_logprobs_from[step.row] is not None or self.rows.pools[step.row] is not None
            for step in plan.rows
        )
        return Step(plan, batch, hidden if keep else None, logits, top, waiting)

    def _logits_of(self, rows: int) -> Tensor:
        """Room for the logits of a step, which the next one uses again: fresh memory would cost more than
        reading what is written there. Grows to the largest step."""
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self.spec.vocab_size, device=self.device)
        return self._logits[:rows]

    @torch.inference_mode()
    def sample(self, step: Step, masks: Masks | None = None) -> SampledStep:
        """Choose the sampling rows' tokens and append them to the rows."""
        steps = step.plan.rows
        sampling = [entry for entry in steps if entry.samples]
        tokens = torch.zeros(0, dtype=torch.int64, device=self.device)
        usable = torch.zeros(0, dtype=torch.bool, device=self.device)
        if sampling:
            row_ids = np.array([entry.row for entry in sampling], np.int64)
            positions = self.rows.computed[row_ids]
            bound = None if masks is None else TokenMasks(masks.at, masks.words)
            if step.top is not None:
                tokens, usable = step.top
            else:
                choices = choices_of(
                    [self.rows.live_sampling(entry.row) for entry in sampling],
                    positions.tolist(),
                    lambda i: self.rows.tokens[row_ids[i], : positions[i]],
                )
                if step.last is not None:
                    tokens, usable = self.model.top(step.last, bound, choices)
                elif step.logits is not None:
                    tokens, usable = self.kernels.choose(step.logits, choices, bound)
            self.rows.put_tokens(row_ids, positions, tokens)
        results, index = [], 0
        for number, entry in enumerate(steps):
            prompt = self._prompt_logprobs(step, number, entry)
            vector = self._pool(step, number, entry)
            if not entry.samples:
                results.append(_RowResult(None, None, prompt))
                continue
            wanted = self.rows.live_sampling(entry.row).logprobs
            logprobs = None
            if wanted is not None and step.logits is not None:
                at = slice(index, index + 1)
                logprobs = logprobs_of(step.logits[at], tokens[at], wanted)
            results.append(_RowResult(index, logprobs, prompt, vector))
            index += 1
        return SampledStep(tokens, usable, results)

    def _pool(self, step: Step, number: int, entry: RowStep) -> Tensor | None:
        """Take this chunk's hidden states into the row's pool. The vector, if the chunk is the last."""
        pool = self.rows.pools[entry.row]
        if pool is None or step.hidden is None or step.batch is None:
            return None
        if pool.kind == "mean" or entry.samples:
            begin = int(step.batch.q_start[number])
            pool.add(self.model.states(step.hidden[begin : begin + entry.q_len]))
        return pool.result() if entry.samples else None

    def _prompt_logprobs(self, step: Step, number: int, entry: RowStep) -> list[Logprobs] | None:
        """Logprobs of the prompt tokens that this chunk predicts, in slices that bound the memory."""
        first = self.rows.prompt_logprobs_from[entry.row]
        if first is None or step.hidden is None or step.batch is None:
            return None
        end = int(self.rows.computed[entry.row])  # the chunk ran positions [begin, end) and predicts +1
        begin = end - entry.q_len
        start, stop = max(first, begin + 1), min(end + 1, int(self.rows.prompt_len[entry.row]))
        wanted = self.rows.live_sampling(entry.row).logprobs
        if start >= stop or wanted is None:
            return None
        chunk = step.hidden[int(step.batch.q_start[number]) :]
        size = max(1, _PROMPT_LOGITS // self.spec.vocab_size)
        parts = []
        for low in range(start, stop, size):
            high = min(low + size, stop)
            logits = self.model.logits(chunk[low - 1 - begin : high - 1 - begin])
            parts.append(logprobs_of(logits, self.rows.tokens[entry.row, low:high], wanted))
        return parts

    def memory_report(self) -> dict[str, int]:
        """Bytes that this worker holds, by owner."""
        return {
            "weight_bytes": self.model.nbytes,
            "kv_pool_bytes": self.pool.nbytes,
            "rows_bytes": self.rows.nbytes,
        }
