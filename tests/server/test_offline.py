"""The offline Engine over a real core, with a tiny random model."""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trunkline
from trunkline.types import RequestError

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Any]:
    with trunkline.Engine(
        model_path=str(tiny_model), max_total_tokens=2048, context_length=256, cpu_threads=1
    ) as engine:
        yield engine


def idle(engine: Any) -> bool:
    """No request holds anything: all pages are free or cached."""
    state = engine.get_server_info()["internal_states"][0]
    return state["running"] == state["waiting"] == state["pages_in_use"] == 0


def test_one_prompt(engine: Any) -> None:
    answer = engine.generate("Hello", GREEDY)
    assert set(answer) == {"text", "output_ids", "meta_info"}
    assert len(answer["output_ids"]) == 6 and answer["meta_info"]["completion_tokens"] == 6
    assert answer == {**engine.generate("Hello", GREEDY), "meta_info": answer["meta_info"]}
    ids = engine.tokenizer.encode("Hello")
    assert engine.generate(input_ids=ids, sampling_params=GREEDY)["output_ids"] == answer["output_ids"]


def test_lists_and_n(engine: Any) -> None:
    prompts = [f"prompt {i}" for i in range(10)]
    alone = [engine.generate(prompt, GREEDY)["output_ids"] for prompt in prompts]
    together = engine.generate(prompts, GREEDY)
    assert [answer["output_ids"] for answer in together] == alone
    sampled = {"temperature": 1.0, "max_new_tokens": 6, "ignore_eos": True, "sampling_seed": 7}
    several = engine.generate("Hello", {**sampled, "n": 3})
    single = [engine.generate("Hello", {**sampled, "sampling_seed": 7 + i}) for i in range(3)]
    assert [answer["output_ids"] for answer in several] == [answer["output_ids"] for answer in single]
    assert engine.generate(["Hello"], GREEDY)[0]["text"] == engine.generate("Hello", GREEDY)["text"]


def test_streams_are_cumulative(engine: Any) -> None:
    whole = engine.generate("Hello", GREEDY)
    parts = list(engine.generate("Hello", GREEDY, stream=True))
    assert [part["meta_info"]["completion_tokens"] for part in parts] == list(range(1, 7))
    assert parts[-1]["text"] == whole["text"] and parts[-1]["output_ids"] == whole["output_ids"]
    last = {part["index"]: part["output_ids"] for part in engine.generate(["a", "b"], GREEDY, stream=True)}
    assert list(last.values()) == [answer["output_ids"] for answer in engine.generate(["a", "b"], GREEDY)]


def test_a_stream_left_early_is_aborted(engine: Any) -> None:
    stream = engine.generate("Hello", {"max_new_tokens": 200, "ignore_eos": True}, stream=True)
    next(stream)
    stream.close()
    for _ in range(200):
        if idle(engine):
            break
    assert idle(engine)


async def test_async(engine: Any) -> None:
    whole = engine.generate("Hello", GREEDY)
    answers = await asyncio.gather(*(engine.async_generate("Hello", GREEDY) for _ in range(4)))
    assert [answer["output_ids"] for answer in answers] == [whole["output_ids"]] * 4
    parts = [part async for part in await engine.async_generate("Hello", GREEDY, stream=True)]
    assert parts[-1]["text"] == whole["text"] and len(parts) == 6
    task = asyncio.create_task(engine.async_generate("Hi", {"max_new_tokens": 200, "ignore_eos": True}))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(200):
        if idle(engine):
            break
    assert idle(engine)


def test_threads_share_the_engine(engine: Any) -> None:
    whole = engine.generate("Hello", GREEDY)["output_ids"]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: engine.generate("Hello", GREEDY)["output_ids"], range(16))
    assert list(answers) == [whole] * 16


def test_logprobs(engine: Any) -> None:
    meta = engine.generate(
        "Hello", GREEDY, return_logprob=True, logprob_start_len=1, top_logprobs_num=2, token_ids_logprob=[3]
    )["meta_info"]
    assert len(meta["output_token_logprobs"]) == 6
    assert meta["output_top_logprobs"][0][0][:2] == meta["output_token_logprobs"][0][:2]  # greedy: the best
    assert meta["input_token_logprobs"][0][0] is None
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"] - 1
    assert meta["output_token_ids_logprobs"][0][0][1] == 3


def test_errors_name_the_prompt_and_leave_nothing(engine: Any) -> None:
    with pytest.raises(RequestError, match=r"^prompt 2: the prompt has \d+ tokens") as caught:
        engine.generate(["a", "b", "c " * 400], GREEDY)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert idle(engine)
    for call, code in [
        (lambda: engine.generate("a", {"temprature": 1}), "unknown_field"),
        (lambda: engine.generate("a", lora_path="x"), "unsupported_field"),
        (lambda: engine.generate("a", nonsense=1), "unknown_field"),
        (lambda: engine.generate(), "invalid_value"),
        (lambda: engine.generate("a", {"temperature": float("nan")}), "out_of_range"),
        (lambda: engine.generate("a\ud800"), "invalid_unicode"),
    ]:
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.code == code


def test_flush_and_information(engine: Any) -> None:
    prompt = "a long prompt " * 10
    engine.generate(prompt, GREEDY)
    assert engine.generate(prompt, GREEDY)["meta_info"]["cached_tokens"] > 0
    assert engine.flush_cache()
    assert engine.generate(prompt, GREEDY)["meta_info"]["cached_tokens"] == 0
    info = engine.get_server_info()
    assert info["model"]["weight_version"] == "default" and info["ready"]["max_context"] == 256


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(RequestError, match="page-sise"):
        trunkline.Engine(model_path="x", page_sise=3)


def test_shutdown_twice_and_use_after(tiny_model: Path) -> None:
    before = threading.active_count()
    engine = trunkline.Engine(model_path=str(tiny_model), max_total_tokens=256, cpu_threads=1)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(RequestError) as caught:
        engine.generate("a")
    assert caught.value.code == "engine_closed"
    dropped = trunkline.Engine(model_path=str(tiny_model), max_total_tokens=256, cpu_threads=1)
    del dropped
    gc.collect()
    assert threading.active_count() <= before + 1  # the loop's pool may keep a helper


@pytest.mark.slow
def test_a_script_that_forgets_shutdown_ends(tiny_model: Path) -> None:
    script = (
        f"import trunkline; e = trunkline.Engine(model_path={str(tiny_model)!r}, max_total_tokens=256)\n"
        "s = e.generate('a', {'max_new_tokens': 100, 'ignore_eos': True}, stream=True); next(s); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_vectors_do_not_depend_on_company_or_cache(engine: Any) -> None:
    texts = [f"a text that shares its beginning, number {i} " * 3 for i in range(6)]
    alone = [engine.encode(text)["embedding"] for text in texts]
    engine.flush_cache()
    together = engine.encode(texts)
    assert [answer["embedding"] for answer in together] == alone
    assert sum(number * number for number in alone[0]) == pytest.approx(1)
    cut = engine.encode(texts[0], dimensions=8)["embedding"]
    assert len(cut) == 8 and sum(number * number for number in cut) == pytest.approx(1)
    ids = engine.tokenizer.encode(texts[0])
    assert asyncio.run(engine.async_encode(input_ids=ids))["embedding"] == alone[0]
    with pytest.raises(RequestError, match="dimensions is 4096"):
        engine.encode("a", dimensions=4096)
    with pytest.raises(RequestError, match="is no field"):
        engine.encode("a", dimension=3)
    assert idle(engine)


def test_rerank_compares_each_document_with_its_query(engine: Any) -> None:
    pairs = [("cats", "a cat"), ["dogs", "dogs"], ("cats", "a boat")]
    results = engine.rerank(pairs, rid="mine")
    vectors = {text: np.float32(engine.encode(text)["embedding"]) for pair in pairs for text in pair}
    assert [result["score"] for result in results] == [float(vectors[a] @ vectors[b]) for a, b in pairs]
    assert results[1]["score"] == pytest.approx(1) and results[1]["embedding"] == results[1]["score"]
    assert results[0]["meta_info"]["method"] == "embedding"
    assert [result["meta_info"]["id"] for result in results] == ["mine-2", "mine-3", "mine-4"]
    again = asyncio.run(engine.async_rerank(pairs))
    assert [result["score"] for result in again] == [result["score"] for result in results]
    for bad, code in (([], "out_of_range"), ([["a"]], "out_of_range"), (["ab"], "invalid_type")):
        with pytest.raises(RequestError) as caught:
            engine.rerank(bad)
        assert caught.value.code == code and str(caught.value.param).startswith("prompt")
    with pytest.raises(RequestError, match="is no field"):
        engine.rerank(pairs, top=3)
    assert idle(engine)


def test_scores_are_the_models_probabilities(engine: Any) -> None:
    query, items, labels = "Is this good? " * 8, [" yes it is", " no", " maybe so"], [5, 7, 11]
    result = engine.score(query, items, labels)
    for item, scores in zip(items, result.scores, strict=True):
        answer = engine.generate(
            query + item, {**GREEDY, "max_new_tokens": 1}, return_logprob=True, token_ids_logprob=labels
        )
        chosen = answer["meta_info"]["output_token_ids_logprobs"][0]
        assert scores == [math.exp(entry[0]) for entry in chosen]
    soft = asyncio.run(engine.async_score(query, items, labels, apply_softmax=True))
    assert [sum(scores) for scores in soft.scores] == pytest.approx([1.0] * 3)
    assert soft.cached_tokens > 0 and soft.prompt_tokens == result.prompt_tokens
    assert idle(engine)
