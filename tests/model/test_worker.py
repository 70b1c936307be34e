"""The worker by hand-written plans: rows, faults that stay in their row, log-probabilities, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from tests.model.conftest import Checkpoints
from tests.model.engine import admit, engine_config, make_worker, plan
from trunkline.config.model_spec import ModelError
from trunkline.config.schema import EngineConfig
from trunkline.kernels import ref
from trunkline.layers.pooling import Pool
from trunkline.scheduler.plan import PagesAt, RowOutput, RowStep, StepPlan
from trunkline.types import LogprobParams, Pooling, SamplingParams
from trunkline.worker.runner import NON_FINITE, ModelWorker

POOLINGS: tuple[Pooling, ...] = ("last", "mean")
IDS = [5, 9, 200, 31, 77, 4, 250]


@pytest.fixture
def worker(checkpoints: Checkpoints) -> ModelWorker:
    return make_worker(engine_config(checkpoints("qwen3")[0], page_size=4, num_pages=60, max_running=4))


def step(worker: ModelWorker, *args: tuple[int, int, bool], **kwargs: object) -> list[RowOutput]:
    return worker.sample(worker.forward(plan(*args, **kwargs))).result().rows  # type: ignore[arg-type]


def greedy(worker: ModelWorker, count: int, row: int = 0) -> list[int]:
    return [step(worker, (row, 1, True))[0].token_ids[0] for _ in range(count)]


def test_an_empty_plan_applies_retires_only(worker: ModelWorker) -> None:
    step(worker, (0, 7, True), admits=[admit(IDS, [0, 1])])
    assert step(worker, retires=[0]) == []
    with pytest.raises(ValueError, match="row 0 holds no request"):
        step(worker, (0, 1, True))


def test_the_next_step_needs_nothing_from_the_host(worker: ModelWorker) -> None:
    """Depth 2: three steps are launched before the first result is read."""
    pending = [worker.sample(worker.forward(plan((0, 7, True), admits=[admit(IDS, [0, 1, 2, 3])])))]
    pending += [worker.sample(worker.forward(plan((0, 1, True)))) for _ in range(2)]
    ahead = [entry.result().rows[0].token_ids[0] for entry in pending]
    first = step(worker, (1, 7, True), admits=[admit(IDS, [10, 11, 12, 13], row=1)])[0].token_ids
    assert first + greedy(worker, 2, row=1) == ahead


def test_a_row_is_used_again_before_its_last_result_is_read(worker: ModelWorker) -> None:
    alone = step(worker, (0, 3, True), admits=[admit(IDS[:3], [0])])
    last = worker.sample(worker.forward(plan((0, 1, True))))
    params = SamplingParams(temperature=0.0, logit_bias={3: 1000.0}, min_new_tokens=5)
    new = worker.sample(
        worker.forward(plan((0, 7, True), retires=[0], admits=[admit(IDS, [4, 5], params=params)]))
    )
    assert len(last.result().rows[0].token_ids) == 1
    assert new.result().rows[0].token_ids == [3]
    again = step(worker, (0, 3, True), retires=[0], admits=[admit(IDS[:3], [8])])
    assert again == alone  # bias and bans went with their request


def test_pages_may_grow_and_be_swapped(worker: ModelWorker) -> None:
    step(worker, (0, 7, True), admits=[admit(IDS, [0, 1, 2])])
    expected = greedy(worker, 8)
    step(worker, (1, 4, False), admits=[admit(IDS, [20], row=1)])
    worker.pool.data[:, 3] = worker.pool.data[:, 20]  # page 3 becomes a copy of page 20
    rest = worker.sample(
        worker.forward(StepPlan(step=0, new_pages=[PagesAt(1, 0, [3, 21])], rows=[RowStep(1, 3, 0, True)]))
    ).result()
    grown = worker.forward(
        StepPlan(step=0, new_pages=[PagesAt(1, 2, [22, 23])], rows=[RowStep(1, 1, 0, True)])
    )
    token = worker.sample(grown).result().rows[0].token_ids
    assert [*rest.rows[0].token_ids, *token][1:] == expected[:1]


def test_the_pool_knows_how_far_a_step_writes(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[int] = []
    monkeypatch.setattr(worker.pool, "reach", reached.append)
    step(worker, (0, 7, True), admits=[admit(IDS, [9, 4])])
    worker.forward(StepPlan(step=0, new_pages=[PagesAt(0, 2, [31, 30])], rows=[RowStep(0, 1, 0, True)]))
    step(worker, (0, 1, True))
    assert reached == [9, 31, -1]


def test_a_row_with_non_finite_logits_fails_alone(worker: ModelWorker) -> None:
    admits = [admit(IDS, [2 * row, 2 * row + 1], row=row) for row in range(3)]
    fine = step(worker, (0, 7, True), (1, 7, True), (2, 7, True), admits=admits)
    assert fine[0] == fine[1] == fine[2]
    worker.pool.data[1, 2] = float("inf")  # KV of row 1
    broken = step(worker, (0, 1, True), (1, 1, True), (2, 1, True))
    assert broken[1] == RowOutput([], error=NON_FINITE)
    assert broken[0] == broken[2] and broken[0].error is None
    assert step(worker, (0, 1, True), (2, 1, True))[0].error is None


def test_non_finite_prompt_logprobs_are_an_error(worker: ModelWorker) -> None:
    request = {"logprobs": LogprobParams(prompt_start=1), "prompt_logprobs_from": 2}
    step(worker, (0, 4, False), admits=[admit(IDS, [0, 1], **request)])  # type: ignore[arg-type]
    worker.pool.data[0, 0] = float("nan")
    assert step(worker, (0, 2, False)) == [RowOutput([], error=NON_FINITE)]


def pooled(worker: ModelWorker, kind: Pooling, *chunks: int, row: int = 0) -> bytes:
    """The vector of IDS, run in chunks."""
    admits, outputs = [admit(IDS, [2 * row, 2 * row + 1], row=row, pooling=kind)], []
    for index, size in enumerate(chunks):
        last = index == len(chunks) - 1
        outputs += step(worker, (row, size, last), admits=() if index else admits)
    assert all(output.embedding == b"" for output in outputs[:-1])
    step(worker, retires=[row])
    return outputs[-1].embedding


def test_pooling_is_of_the_states_behind_the_final_norm(worker: ModelWorker) -> None:
    run = worker.forward(
        plan((0, 7, False), admits=[admit(IDS, [0, 1], logprobs=LogprobParams(), prompt_logprobs_from=1)])
    )
    assert run.hidden is not None
    states = worker.model.norm(run.hidden).double()
    step(worker, retires=[0])
    last, mean = (np.frombuffer(pooled(worker, kind, 7), "<f4") for kind in POOLINGS)
    assert last.tolist() == states[-1].float().tolist()
    assert mean.tolist() == pytest.approx(states.mean(0).tolist(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", POOLINGS)
def test_vectors_do_not_depend_on_chunks_or_rows(worker: ModelWorker, kind: Pooling) -> None:
    whole = pooled(worker, kind, 7)
    assert whole
    for chunks in ((1,) * 7, (3, 4), (4, 3), (1, 5, 1)):
        assert pooled(worker, kind, *chunks, row=2) == whole


def test_only_pooled_rows_need_no_output_head(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("top", "logits"):
        product = getattr(worker.model, name)
        monkeypatch.setattr(worker.model, name, lambda *a, f=product: calls.append(1) or f(*a))
    alone = pooled(worker, "last", 7)
    assert alone and not calls
    admits = [admit(IDS, [2, 3], row=1, pooling="last"), admit(IDS, [4, 5], row=2)]
    together = step(worker, (1, 7, True), (2, 7, True), admits=admits)
    assert calls and together[0].embedding == alone and not together[1].embedding


def test_a_state_that_is_not_finite_ends_a_pooled_row(worker: ModelWorker) -> None:
    for kind in POOLINGS:
        step(worker, (0, 4, False), admits=[admit(IDS, [0, 1], pooling=kind)])
        worker.pool.data[0, 0] = float("nan")
        assert step(worker, (0, 3, True)) == [RowOutput([], error=NON_FINITE)]
        step(worker, retires=[0])


def test_a_mean_that_has_no_room_is_no_number() -> None:
    pool = Pool("mean", 2, torch.device("cpu"))
    pool.add(torch.tensor([[1.0, 3.0], [2.0, -4.0]]))
    assert pool.result().tolist() == [1.5, -0.5]
    pool.add(torch.tensor([[1.0, 2.0**29]]))
    assert pool.result().isnan().all()


def test_every_token_banned_ends_one_row(worker: ModelWorker) -> None:
    vocab = worker.spec.vocab_size
    params = SamplingParams(min_new_tokens=1, stop_token_ids=tuple(range(vocab)))
    admits = [admit(IDS, [0, 1], params=params), admit(IDS, [2, 3], row=1)]
    bad, good = step(worker, (0, 7, True), (1, 7, True), admits=admits)
    assert bad.error == NON_FINITE and good.error is None


def test_prompt_logprobs_do_not_depend_on_chunks_or_slices(
    worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = LogprobParams(prompt_start=1, top_n=3, token_ids=(1,))
    request = {"logprobs": wanted, "prompt_logprobs_from": 2}
    whole = step(worker, (0, 7, True), admits=[admit(IDS, [0, 1], **request)])[0]  # type: ignore[arg-type]
    assert whole.prompt_logprobs is not None and whole.logprobs is not None
    assert [entry.token_id for entry in whole.prompt_logprobs] == IDS[2:]
    monkeypatch.setattr("trunkline.worker.runner._PROMPT_LOGITS", 2 * worker.spec.vocab_size)
    found, outputs = [], None
    for number, (size, samples) in enumerate([(1, False), (4, False), (2, True)]):
        admits = [admit(IDS, [10, 11], row=1, **request)] if number == 0 else []  # type: ignore[arg-type]
        (out,) = step(worker, (1, size, samples), admits=admits)
        found += out.prompt_logprobs or []
        outputs = out.logprobs
    assert found == whole.prompt_logprobs
    assert outputs == whole.logprobs
    assert step(worker, (1, 1, True))[0].prompt_logprobs is None


def test_logprobs_are_of_the_raw_distribution(worker: ModelWorker) -> None:
    params = SamplingParams(temperature=0.3, logit_bias={3: 1000.0}, top_k=5)
    admits = [
        admit(IDS, [0, 1], logprobs=LogprobParams(token_ids=(3,))),
        admit(IDS, [2, 3], row=1, params=params, logprobs=LogprobParams()),
    ]
    raw, biased = step(worker, (0, 7, True), (1, 7, True), admits=admits)
    assert raw.logprobs is not None and biased.logprobs is not None
    assert biased.token_ids == [3]
    assert biased.logprobs[0].logprob == raw.logprobs[0].chosen[0][1]


def test_plans_that_cannot_be_run_are_refused(worker: ModelWorker) -> None:
    step(worker, (0, 7, True), admits=[admit(IDS, [0, 1])])
    with pytest.raises(ValueError, match="no drafter"):
        worker.forward(StepPlan(step=0, rows=[RowStep(0, 2, 1, True)]))
    with pytest.raises(ValueError, match="can't be run"):
        step(worker, (0, 600, True))
    with pytest.raises(ValueError, match="exceed max_context 512"):
        step(worker, (1, 1, True), admits=[admit([1] * 513, [0], row=1)])
    with pytest.raises(ValueError, match="200 pages exceed the table's 128"):
        step(worker, (1, 1, True), admits=[admit(IDS, [0] * 200, row=1)])
    assert greedy(worker, 1)


def test_the_batch_describes_its_shape(worker: ModelWorker) -> None:
    admits = [admit(IDS, [0, 1, 2]), admit(IDS[:4], [5], row=1)]
    mixed = worker.forward(plan((0, 7, True), (1, 3, False), admits=admits)).batch
    assert mixed is not None
    shape = mixed.shape
    assert (shape.num_reqs, shape.num_tokens, shape.max_q_len, shape.max_seq_len_bound) == (2, 10, 7, 7)
    assert shape.uniform_q_len is None
    assert mixed.q_start.tolist() == [0, 7, 10] and mixed.seq_lens.tolist() == [7, 3]
    assert mixed.token_ids.tolist() == [*IDS, *IDS[:3]]
    assert mixed.positions.tolist() == [*range(7), *range(3)]
    assert mixed.slot_mapping.tolist() == [*range(7), 20, 21, 22]
    assert mixed.logits_idx.tolist() == [6]
    decode = worker.forward(plan((1, 1, True), (0, 1, True))).batch
    assert decode is not None and decode.shape.uniform_q_len == 1
    assert decode.slot_mapping.tolist() == [23, 7]


def test_memory_report_is_what_is_held(worker: ModelWorker) -> None:
    spec, report = worker.spec, worker.memory_report()
    assert report["kv_pool_bytes"] == spec.kv_bytes_per_token("float32") * (61 * 4)
    norms = spec.num_layers * 2 * (spec.hidden_size + spec.head_dim) + spec.hidden_size
    once = 4 * (spec.weight_count - norms)  # the tied embedding is held by the output head alone
    assert once <= report["weight_bytes"] < 1.07 * once  # outputs are padded to panels of 16


def bfloat16_config(folder: Path) -> EngineConfig:
    config = engine_config(folder)
    model, cache = replace(config.model, dtype="bfloat16"), replace(config.cache, kv_dtype="bfloat16")
    return replace(config, model=model, cache=cache)


@pytest.mark.parametrize("family", ["qwen3", "llama-linear-bias"])
def test_bfloat16_logits(family: str, checkpoints: Checkpoints) -> None:
    folder, model = checkpoints(family)
    worker = make_worker(bfloat16_config(folder))
    assert worker.pool.data.dtype == torch.bfloat16
    logits = worker.forward(plan((0, 7, True), admits=[admit(IDS, [0, 1], params=SamplingParams())])).logits
    assert logits is not None and logits.dtype == torch.float32
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, -1]
    assert 0 < float((logits[0] - expected).norm() / expected.norm()) < 0.03


def test_bfloat16_is_refused_by_name_where_it_cannot_be_had(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.worker.runner.load_kernels", lambda device: ref)
    monkeypatch.setattr(ref, "supports_linear", lambda dtype, device: False)
    with pytest.raises(ModelError, match=r"bfloat16.*--dtype float32"):
        make_worker(bfloat16_config(checkpoints("qwen3")[0]))
