"""Against transformers, each family on a tiny random checkpoint: logits, greedy tokens, log-probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.model.checkpoints import FAMILIES
from tests.model.conftest import Checkpoints
from tests.model.engine import admit, engine_config, make_core, make_worker, plan, run
from trunkline.messages import AddRequest
from trunkline.types import LogprobParams, SamplingParams

OUTPUT = 64

pytestmark = pytest.mark.usefixtures("kernel_set")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 307, (length,), generator=generator).tolist()


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


@torch.no_grad()
def reference_tokens(model: PreTrainedModel, ids: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=OUTPUT,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_position(family: str, checkpoints: Checkpoints) -> None:
    """Chunks of odd sizes through hand-written plans; the logits of every position within 1e-4."""
    folder, model = checkpoints(family)
    ids = prompt(430)
    worker = make_worker(engine_config(folder, page_size=8, num_pages=100))
    expected = reference_logits(model, ids)
    done = 0
    for number, size in enumerate((1, 5, 100, 37, 130, 1, 156)):
        admits = [admit(ids, list(range(20, 80)))] if number == 0 else []
        step = worker.forward(plan((0, size, True), admits=admits))
        with torch.inference_mode():
            hidden = worker.model.forward(step.batch, worker.backend, worker.backend.plan(step.batch))
            found = worker.model.logits(hidden)
        assert (found - expected[done : done + size]).abs().max() < 1e-4
        assert step.top[0].item() == found[-1].argmax() and step.top[1].all()
        done += size
    assert done == len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, checkpoints: Checkpoints) -> None:
    """64 greedy tokens, whole and in chunks, and again from the cache."""
    folder, model = checkpoints(family)
    params = SamplingParams(temperature=0.0, max_new_tokens=OUTPUT, ignore_eos=True)
    ids = prompt(150)
    requests = [
        AddRequest(rid="first", token_ids=ids, params=params),
        AddRequest(rid="again", token_ids=ids, params=params),
        AddRequest(rid="other", token_ids=[*ids[:90], *prompt(20, seed=1)], params=params),
    ]
    expected = {request.rid: reference_tokens(model, request.token_ids) for request in requests}
    for step_tokens, prefix_cache in ((512, False), (23, False), (23, True)):
        core = make_core(engine_config(folder, step_tokens=step_tokens, prefix_cache=prefix_cache))
        results = run(core, requests, gap=-1 if prefix_cache else 0)
        assert core.scheduler.counters["cached_tokens"] > 200 or not prefix_cache
        assert {rid: result.tokens for rid, result in results.items()} == expected


@pytest.mark.parametrize("step_tokens", [512, 19])
def test_logprobs(step_tokens: int, checkpoints: Checkpoints) -> None:
    folder, model = checkpoints("qwen3")
    core = make_core(engine_config(folder, step_tokens=step_tokens))
    ids, start = prompt(61), 7
    request = AddRequest(
        rid="a",
        token_ids=ids,
        params=SamplingParams(temperature=0.0, max_new_tokens=9, ignore_eos=True),
        logprobs=LogprobParams(prompt_start=start, top_n=4, token_ids=(11, 3)),
    )
    result = run(core, [request])["a"]
    expected = reference_logits(model, ids + result.tokens).log_softmax(-1)
    assert result.prompt_logprobs is not None and result.prompt_logprobs[0].logprob is None
    entries = [*result.prompt_logprobs, *result.logprobs]
    assert [entry.token_id for entry in entries] == (ids + result.tokens)[start:]
    for position, entry in enumerate(entries[1:], start=start + 1):
        row = expected[position - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert [row[token].item() for token, _ in entry.top] == pytest.approx(
            [value for _, value in entry.top], abs=1e-4
        )
        assert entry.chosen == [
            (11, pytest.approx(float(row[11]), abs=1e-4)),
            (3, pytest.approx(float(row[3]), abs=1e-4)),
        ]
