"""The metamorphic matrix: no setting that should not matter may change a bit of tokens or log-probabilities.

The axes and their values come from the capability table; every pair of values of two axes occurs in some
case. Each case runs the same requests and must give exactly what the simplest engine gives each one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.conftest import Checkpoints
from tests.model.engine import Result, engine_config, make_core, run
from trunkline.config.compat import FEATURES
from trunkline.config.schema import EngineConfig
from trunkline.kernels.ops import Kernels, TokenMasks
from trunkline.layers.pooling import Pool
from trunkline.messages import AddRequest
from trunkline.scheduler.plan import TokensAt
from trunkline.types import GrammarSpec, LogprobParams, Pooling, SamplingParams, Thinking
from trunkline.worker.rows import Rows

ROUNDS = [f.axis for f in FEATURES if f.rounds]
AXES: Mapping[str, tuple[Any, ...]] = {f.axis: f.values for f in FEATURES if f.axis}
POOLINGS: tuple[Pooling, ...] = ("mean", "last")
GAPS = {"alone": -1, "together": 0, "staggered": 3}
CONTEXT = 160
Case = dict[str, Any]
PLAIN: Case = {"prefix_cache": False, "page_size": 16, "step_tokens": 512, "depth": 0, "batch": "alone"}


def pairwise_cases() -> list[Case]:
    """A covering array: each case starts at an uncovered pair and takes the values that cover most."""
    names = list(AXES)
    left = {((a, x), (b, y)) for a, b in combinations(names, 2) for x, y in product(AXES[a], AXES[b])}
    cases = []
    while left:
        (a, x), (b, y) = min(left, key=repr)
        case: Case = {a: x, b: y}
        for name in (n for n in names if n not in case):
            case[name] = max(AXES[name], key=lambda value: len(_covered({**case, name: value}) & left))
        left -= _covered(case)
        cases.append(case)
    return cases


def _covered(case: Case) -> set[Any]:
    items = [(name, case[name]) for name in AXES if name in case]
    return set(combinations(items, 2))


def configure(folder: Path, case: Case) -> EngineConfig:
    """`tight` pools hold one longest request and little more, so that requests are preempted."""
    free = {
        "mix": "always",
        "policy": "fcfs",
        "pool": "ample",
        "jump_forward": False,
        "kv_cache_dtype": "auto",
    }
    case = {**free, **case}
    tokens = CONTEXT + 40 if case["pool"] == "tight" else 8 * CONTEXT
    return engine_config(
        folder,
        page_size=case["page_size"],
        num_pages=-(-tokens // case["page_size"]),
        prefix_cache=case["prefix_cache"],
        kv_dtype="float32" if case["kv_cache_dtype"] == "auto" else case["kv_cache_dtype"],
        step_tokens=case["step_tokens"],
        depth=case["depth"],
        mix=case["mix"],
        policy=case["policy"],
        jump_forward=case["jump_forward"],
        max_running=6,
        max_context=CONTEXT,
        conservativeness=0.1,  # admit many, so that a tight pool has to preempt
    )


def requests() -> list[AddRequest]:
    """Shared and unshared prompts; greedy, sampled, filtered and penalized; with and without logprobs,
    grammars and reasoning."""
    generator = torch.Generator().manual_seed(4)
    trunk = torch.randint(3, 307, (70,), generator=generator).tolist()
    own = [torch.randint(3, 307, (n,), generator=generator).tolist() for n in (9, 1, 23, 40, 5, 2, 31, 64)]
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.02, "frequency_penalty": 0.4},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.2},
        {"temperature": 1.0, "logit_bias": {5: 3.0, 8: -50.0}, "min_new_tokens": 12},
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 0.9},
    ]
    built = []
    for i, (tail, kind) in enumerate(zip(own, kinds, strict=True)):
        logprobs = LogprobParams(prompt_start=20 if i % 4 == 2 else None, top_n=2, token_ids=(9,))
        built.append(
            AddRequest(
                rid=f"r{i}",
                token_ids=trunk[: 70 - 9 * (i % 3)] + tail if i != 3 else tail,
                params=SamplingParams(max_new_tokens=30, sampling_seed=i, **kind),  # type: ignore[arg-type]
                logprobs=logprobs if i % 2 == 0 else None,
            )
        )
    for i, (source, thinking) in enumerate(
        (
            ("a", None),
            ("b", None),
            ("c", Thinking((5,), 4)),
            ("d", Thinking((5, 6), 9)),
            (None, Thinking((5,), 2)),
        )
    ):
        kind = kinds[i] if i < 4 else kinds[0]
        built.append(
            AddRequest(
                rid=f"g{i}",
                token_ids=trunk[: 61 - i] + own[i],
                params=SamplingParams(
                    max_new_tokens=30,
                    sampling_seed=i,
                    min_new_tokens=6 * (i % 2),
                    **kind,  # type: ignore[arg-type]
                ),
                logprobs=LogprobParams(top_n=1) if i == 3 else None,
                grammar=None if source is None else GrammarSpec("regex", source),
                thinking=thinking,
            )
        )
    for i, kind in enumerate(POOLINGS * 2):
        built.append(
            AddRequest(
                rid=f"p{i}",
                token_ids=trunk[: 66 - 3 * i] + own[i],
                params=SamplingParams(max_new_tokens=0, temperature=0.0),
                pooling=kind,
            )
        )
    return built


def outcome(folder: Path, case: Case) -> tuple[dict[str, Result], dict[str, int]]:
    core = make_core(configure(folder, case))
    results = run(core, requests(), GAPS[case["batch"]])
    return results, dict(core.scheduler.counters)


Expected = Callable[[str, Case], dict[str, Result]]


@pytest.fixture(scope="module")
def expected(checkpoints: Checkpoints, kernel_set: Kernels) -> Expected:
    """What the simplest engine with the case's settings that round gives, for a family of the matrix."""

    @cache
    def plain(family: str, *settings: tuple[str, Any]) -> dict[str, Result]:
        return outcome(checkpoints(family)[0], {**PLAIN, **dict(settings)})[0]

    return lambda family, case: plain(family, *((axis, case[axis]) for axis in ROUNDS if axis in case))


def test_the_array_covers_every_pair() -> None:
    wanted = {((a, x), (b, y)) for a, b in combinations(AXES, 2) for x, y in product(AXES[a], AXES[b])}
    assert set().union(*map(_covered, pairwise_cases())) == wanted
    assert {"prefix_cache", "page_size", "step_tokens", "depth", "batch", "pool"} <= set(AXES)


@pytest.mark.parametrize("case", pairwise_cases(), ids=lambda case: "-".join(map(str, case.values())))
def test_settings_change_no_bit(case: Case, checkpoints: Checkpoints, expected: Expected) -> None:
    family = "mistral" if case["page_size"] == 4 else "qwen3"
    results, _ = outcome(checkpoints(family)[0], case)
    assert results == expected(family, case)


def test_the_matrix_exercises_what_it_claims(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3")[0]
    tight = {**PLAIN, "batch": "together", "pool": "tight", "step_tokens": 24}
    assert outcome(folder, tight)[1]["retractions"] > 0
    assert outcome(folder, {**PLAIN, "prefix_cache": True})[1]["cached_tokens"] > 100
    assert outcome(folder, {**PLAIN, "jump_forward": True})[1]["forced_tokens"] > 5
    rounded = [outcome(folder, {**PLAIN, "kv_cache_dtype": name})[0] for name in ("auto", "bfloat16", "int8")]
    assert rounded[0] != rounded[1] != rounded[2]


def stale_pages(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """The worker misses that a row's page table has grown, and reads the pages of the row's last request."""
    right = Rows.set_pages
    patch.setattr(Rows, "set_pages", lambda self, entry: entry.start or right(self, entry))


def batch_dependent_product(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """A matrix product whose last bit depends on the number of rows."""
    right = kernels.linear

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(x, *rest) * (1 + 2**-23 * (len(x) % 3 == 0))

    patch.setattr(kernels, "linear", wrong)


def seed_of_the_step(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """Randomness drawn from a stream that all rows share."""
    patch.setattr(
        "trunkline.layers.sampler.uniform", lambda seeds, positions: torch.rand(len(seeds)).double()
    )


def sum_of_chunk_means(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """A mean in floating point, chunk by chunk."""
    patch.setattr(
        Pool, "add", lambda self, states: setattr(self, "_last", states.mean(0) + _or_zero(self._last))
    )


def _or_zero(tensor: torch.Tensor | None) -> torch.Tensor | float:
    return 0.0 if tensor is None else tensor


def late_positions(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """Overlap goes wrong: the sampled token is put one place too late for the next step to find it."""
    right = Rows.put_tokens
    patch.setattr(
        Rows, "put_tokens", lambda self, rows, positions, tokens: right(self, rows, positions + 1, tokens)
    )


def forced_tokens_forgotten(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """The worker does not put the last forced token into the row."""
    right = Rows.append
    patch.setattr(Rows, "append", lambda self, entry: right(self, _shorter(entry)))


def _shorter(entry: TokensAt) -> TokensAt:
    return TokensAt(entry.row, entry.start, entry.token_ids[:-1])


def masks_of_the_neighbor(patch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    """A row gets the mask of the row before."""
    patch.setattr(
        "trunkline.worker.runner.TokenMasks", lambda at, words: TokenMasks(at, np.roll(words, 1, axis=0))
    )


BUGS = [
    stale_pages,
    batch_dependent_product,
    seed_of_the_step,
    sum_of_chunk_means,
    late_positions,
    forced_tokens_forgotten,
    masks_of_the_neighbor,
]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(
    bug: Any,
    kernel_set: Kernels,
    checkpoints: Checkpoints,
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = [(case, expected("qwen3", case)) for case in _few(pairwise_cases())]
    bug(monkeypatch, kernel_set)
    assert any(outcome(checkpoints("qwen3")[0], case)[0] != results for case, results in wanted)


def _few(cases: list[Case]) -> Iterator[Case]:
    yield from (case for case in cases if case["batch"] != "alone")
