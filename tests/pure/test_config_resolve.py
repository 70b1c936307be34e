"""Resolution is pure, explains itself, and adds up."""

from __future__ import annotations

import dataclasses
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.config_cases import BF16_MACHINE, GIB, GPU_MACHINE, MACHINE, spec
from trunkline.config.flags import Args
from trunkline.config.hardware import Gpu
from trunkline.config.memory import Demand, show
from trunkline.config.resolve import Resolved, field_names, load_config, resolve
from trunkline.config.schema import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from trunkline.types import RequestError


def refusal(args: Args, model: object = None, machine: object = MACHINE) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolve(args, model or spec(), machine)  # type: ignore[arg-type]
    return caught.value


def with_gpu(gib: int, capability: float = 9.0) -> object:
    return msgspec.structs.replace(GPU_MACHINE, gpus=(Gpu("Test GPU", gib * GIB, gib * GIB, capability),))


# ---------------------------------------------------------------------- the tree
def test_the_tree_is_small_frozen_and_survives_json() -> None:
    config = resolve(Args(), spec(), MACHINE).config
    assert len(field_names(config)) <= 90
    assert EngineConfig.from_json(config.to_json()) == config
    with pytest.raises(AttributeError):
        config.cache.page_size = 1  # type: ignore[misc]
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        EngineConfig.from_json(config.to_json().replace(b'"page_size"', b'"pagesize"'))
    with pytest.raises(msgspec.ValidationError):
        EngineConfig.from_json(config.to_json().replace(b'"never"', b'"x"').replace(b'"always"', b'"x"'))


def test_groups_have_defaults_that_fit_together() -> None:
    scheduler, cache = SchedulerConfig(), CacheConfig()
    assert scheduler.step_tokens >= scheduler.max_running
    assert cache.num_tokens == cache.page_size * cache.num_pages >= scheduler.max_context
    assert EngineConfig(model=ModelConfig(path="x")).model.served_model_name


def test_every_value_has_a_reason_and_resolving_twice_gives_the_same() -> None:
    for machine in (MACHINE, BF16_MACHINE, GPU_MACHINE):
        first, second = (resolve(Args(), spec(), machine) for _ in range(2))
        assert set(field_names(first.config)) <= set(first.reasons)
        assert all(first.reasons.values())
        assert first == second
        for name in first.derived:
            assert name in first.summary() and first.reasons[name] in first.summary()
        assert "server.port" not in first.derived


# ---------------------------------------------------------------------- device and dtype
@pytest.mark.parametrize(
    ("machine", "checkpoint", "device", "dtype"),
    [
        (MACHINE, "bfloat16", "cpu", "float32"),
        (MACHINE, "float32", "cpu", "float32"),
        (MACHINE, "float16", "cpu", "float32"),
        (BF16_MACHINE, "bfloat16", "cpu", "bfloat16"),
        (BF16_MACHINE, "float32", "cpu", "float32"),
        (BF16_MACHINE, "float16", "cpu", "float32"),
        (GPU_MACHINE, "bfloat16", "cuda", "bfloat16"),
        (GPU_MACHINE, "float16", "cuda", "float32"),
        (with_gpu(16, 7.0), "bfloat16", "cuda", "float32"),
        (msgspec.structs.replace(GPU_MACHINE, torch_version="2.13.0+cpu"), "bfloat16", "cpu", "float32"),
    ],
)
def test_automatic_device_and_dtype(machine: object, checkpoint: str, device: str, dtype: str) -> None:
    resolved = resolve(Args(), spec(dtype=checkpoint), machine)  # type: ignore[arg-type]
    model = resolved.config.model
    assert (model.device, model.dtype, resolved.config.cache.kv_dtype) == (device, dtype, dtype)


def test_devices_and_dtypes_that_are_not_there_are_refused() -> None:
    error = refusal(Args(device="cuda"))
    assert error.code == "device_unavailable" and "nvidia-smi" in error.message
    cpu_torch = msgspec.structs.replace(GPU_MACHINE, torch_version="2.13.0+cpu")
    assert "without CUDA" in refusal(Args(device="cuda"), machine=cpu_torch).message
    old = msgspec.structs.replace(MACHINE, cpu_flags=("avx2",))
    error = refusal(Args(dtype="bfloat16"), machine=old)
    assert error.code == "dtype_unavailable" and error.param == "--dtype" and "test CPU" in error.message
    assert resolve(Args(dtype="bfloat16"), spec(), MACHINE).config.model.dtype == "bfloat16"


def test_native_kernels_take_bfloat16_anywhere_and_hold_a_tied_head_once() -> None:
    old = msgspec.structs.replace(MACHINE, cpu_flags=())
    native = msgspec.structs.replace(old, native_kernels=True)
    assert resolve(Args(), spec(), old).config.model.dtype == "float32"
    resolved = resolve(Args(), spec(), native)
    assert resolved.config.model.dtype == resolved.config.cache.kv_dtype == "bfloat16"
    assert resolved.memory.size_of("weights") == 2 * spec().weight_count
    assert resolved.memory.size_of("kernels") > 0 and not resolved.memory.size_of("attention")


def test_keys_and_values_have_a_type_of_their_own() -> None:
    for asked, dtype, found in (
        ("auto", "float32", "float32"),
        ("auto", "bfloat16", "bfloat16"),
        ("bf16", "float32", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("int8", "bfloat16", "int8"),
    ):
        args = Args(kv_cache_dtype=asked, dtype=dtype, kv_memory=GIB)
        resolved = resolve(args, spec(), BF16_MACHINE)
        assert resolved.config.cache.kv_dtype == found
        size = spec().kv_bytes_per_token(resolved.config.cache.kv_dtype)
        assert resolved.config.cache.num_tokens == GIB // (16 * size) * 16
        assert resolved.memory.size_of("KV pool") == resolved.config.cache.num_tokens * size


def test_threads_come_from_the_flag_the_environment_or_the_cores() -> None:
    wanted = msgspec.structs.replace(MACHINE, threads_wanted=7)
    assert resolve(Args(), spec(), MACHINE).config.model.threads == 2
    assert resolve(Args(), spec(), wanted).config.model.threads == 7
    assert resolve(Args(cpu_threads=3), spec(), wanted).config.model.threads == 3


# ---------------------------------------------------------------------- steps
def test_a_pooling_that_is_not_built_must_be_replaced_by_name() -> None:
    for asked in ("cls_token", "mean + max_tokens", "weightedmean"):
        error = refusal(Args(), spec(pooling=asked))
        assert (error.code, error.param) == ("unsupported_pooling", "pooling")
        assert asked in error.message and "--pooling" in error.message
        resolved = resolve(Args(pooling="mean"), spec(pooling=asked), MACHINE)
        assert resolved.config.model.pooling == "mean"
    assert resolve(Args(), spec(pooling="mean"), MACHINE).config.model.pooling == "mean"
    assert resolve(Args(), spec(), MACHINE).config.model.pooling == "last"


def test_steps() -> None:
    def step(machine: object = MACHINE, **flags: int) -> tuple[int, int]:
        scheduler = resolve(Args(**flags), spec(), machine).config.scheduler  # type: ignore[arg-type]
        return scheduler.max_running, scheduler.step_tokens

    assert step() == (64, 512)
    assert step(chunked_prefill_size=32) == (32, 32)  # a token for each
    assert step(max_running_requests=600) == (600, 600)
    assert step(max_prefill_tokens=100) == (64, 100)
    assert step(chunked_prefill_size=-1) == (64, 16384)
    assert step(chunked_prefill_size=-1, max_prefill_tokens=10) == (64, 4096)  # a whole prompt may exceed it
    sizes = {10: 2048, 40: 4096, 80: 8192, 180: 16384}
    for gib, tokens in sizes.items():
        assert step(with_gpu(gib)) == (256, tokens)
    for args in (
        Args(chunked_prefill_size=8, max_running_requests=9),
        Args(max_prefill_tokens=3, max_running_requests=4),
    ):
        error = refusal(args)
        assert error.code == "conflicting_flags" and error.param == "--max-running-requests"


def test_overlap_and_mixing() -> None:
    def depth(machine: object, **flags: object) -> int:
        return resolve(Args(**flags), spec(), machine).config.scheduler.depth  # type: ignore[arg-type]

    assert (depth(MACHINE), depth(GPU_MACHINE)) == (0, 1)
    assert depth(GPU_MACHINE, disable_overlap_schedule=True) == 0
    assert depth(MACHINE, overlap_depth=2) == 2
    assert refusal(Args(overlap_depth=1, disable_overlap_schedule=True)).param == "--overlap-depth"
    assert refusal(Args(mix="never", enable_mixed_chunk=True)).param == "--mix"
    assert (
        resolve(Args(mix="always", enable_mixed_chunk=True), spec(), MACHINE).config.scheduler.mix == "always"
    )


def test_without_a_prefix_cache_nothing_waits_for_a_prefix() -> None:
    config = resolve(Args(disable_radix_cache=True), spec(), MACHINE).config
    assert not config.cache.prefix_cache and not config.scheduler.prefill_wait


# ---------------------------------------------------------------------- memory
def test_weights_and_kv_are_exact() -> None:
    demand = Demand(
        spec=spec(),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        device="cuda",
        page_size=16,
        max_running=4,
        max_context=4096,
        step_tokens=64,
    )
    assert spec().weight_count == 596_049_920
    assert demand.weights().bytes == 2 * 596_049_920
    assert demand.token_bytes == 2 * 28 * 8 * 128 * 2 == 112 * 1024
    assert demand.kv_pool(10).bytes == 160 * 112 * 1024
    rounded = dataclasses.replace(demand, kv_dtype="int8")  # a scale of two bytes with each head
    assert rounded.token_bytes == 2 * 28 * 8 * 130 and demand.token_bytes / rounded.token_bytes >= 1.9
    on_cpu = dataclasses.replace(demand, device="cpu")
    assert on_cpu.weights().bytes == 2 * (596_049_920 + 151_936 * 1024)  # the tied head is packed apart
    untied = dataclasses.replace(on_cpu, spec=spec(tie_embeddings=False))
    assert untied.weights().bytes == on_cpu.weights().bytes


def test_the_table_adds_up() -> None:
    plan = resolve(Args(), spec(), MACHINE).memory
    lines = plan.table().splitlines()
    assert plan.needed == sum(item.bytes for item in plan.items)
    for item in plan.items:
        assert any(item.name in line and show(item.bytes) in line for line in lines)
    assert show(plan.needed) in lines[-2] and show(plan.available - plan.needed) in lines[-1]


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (-5 << 30, "-5.00 GiB")]
)  # fmt: skip
def test_sizes_are_shown_for_people(size: int, text: str) -> None:
    assert show(size) == text


def test_pool_sizes() -> None:
    def pool(machine: object = MACHINE, model: object = None, **flags: object) -> Resolved:
        return resolve(Args(**flags), model or spec(), machine)  # type: ignore[arg-type]

    small = spec(num_layers=2, layer_windows=(None,) * 2, vocab_size=1000, max_position=512)
    full = pool(model=small)
    assert full.config.cache.num_tokens == 64 * 512  # every row at full length fits
    assert "64 requests" in full.reasons["cache.num_pages"]

    half = pool()
    left = half.memory.available - half.memory.needed
    kv = half.memory.size_of("KV pool")
    assert (
        abs(left - kv) <= 2 * 16 * 224 * 1024 and half.reasons["cache.num_pages"] == "half of the free memory"
    )

    gpu = pool(GPU_MACHINE, max_running_requests=1000)
    assert 0 <= gpu.memory.available - gpu.memory.needed - GIB < 16 * 112 * 1024

    capped = pool(mem_fraction_static=0.5)
    assert capped.memory.size_of("weights") + capped.memory.size_of("KV pool") <= 8 * GIB
    assert pool(max_total_tokens=1000).config.cache.num_pages == 62  # whole pages only
    assert pool(max_total_tokens=1000, page_size=1).config.cache.num_pages == 1000
    assert pool(kv_memory=GIB).config.cache.num_tokens == GIB // (224 * 1024) // 16 * 16
    one_request = pool(model=spec(max_position=32768))
    assert (
        one_request.config.cache.num_tokens == 32768
    )  # more than half of what is free, for one full request


def test_the_pool_bounds_context_and_rows_unless_they_were_asked_for() -> None:
    small = resolve(Args(max_total_tokens=320), spec(), MACHINE)
    assert small.config.scheduler.max_context == 320 and "4,096" in small.reasons["scheduler.max_context"]
    assert small.config.scheduler.max_running == 20
    error = refusal(Args(max_total_tokens=320, context_length=400))
    assert error.code == "conflicting_flags" and "400" in error.message and "320" in error.message
    assert (
        resolve(
            Args(max_total_tokens=320, max_running_requests=64), spec(), MACHINE
        ).config.scheduler.max_running
        == 64
    )
    error = refusal(Args(context_length=5000))
    assert error.code == "context_too_long" and "4096" in error.message


def test_too_little_memory_says_by_how_much_and_what_helps() -> None:
    error = refusal(Args(max_total_tokens=100_000))
    assert error.code == "too_little_memory" and error.param == "--max-total-tokens"
    most = re.search(r"--max-total-tokens (\d+) is the most", error.message)
    assert most is not None
    fits = int(most.group(1))
    resolve(Args(max_total_tokens=fits), spec(), MACHINE)
    assert refusal(Args(max_total_tokens=fits + 16)).code == "too_little_memory"

    tiny = msgspec.structs.replace(MACHINE, available_bytes=GIB)
    error = refusal(Args(), machine=tiny)
    assert "1.00 GiB is available" in error.message and "--dtype bfloat16 saves 1.40 GiB" in error.message
    assert "0.1 of 16.00 GiB" in refusal(Args(mem_fraction_static=0.1)).message
    assert refusal(Args(max_total_tokens=100, kv_memory=GIB)).param == "--kv-memory"
    assert refusal(Args(max_total_tokens=15)).code == "pool_too_small"
    assert refusal(Args(kv_memory=1000)).param == "--kv-memory"


# ---------------------------------------------------------------------- anything
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_is_asked_the_result_is_sound_or_refused(data: st.DataObject) -> None:
    draw = data.draw
    maybe = lambda strategy: draw(st.none() | strategy)  # noqa: E731
    args = Args(
        context_length=maybe(st.integers(2, 10000)),
        page_size=draw(st.sampled_from([1, 7, 16, 256])),
        max_total_tokens=maybe(st.integers(2, 60000)),
        kv_memory=maybe(st.integers(1, 20 * GIB)),
        mem_fraction_static=maybe(st.floats(0.01, 1.0)),
        max_running_requests=maybe(st.integers(1, 4096)),
        chunked_prefill_size=maybe(st.just(-1) | st.integers(1, 20000)),
        max_prefill_tokens=draw(st.integers(1, 20000)),
        dtype=draw(st.sampled_from(["auto", "float32", "bfloat16"])),
        disable_radix_cache=draw(st.booleans()),
    )
    model = spec(max_position=draw(st.sampled_from([64, 4096, 131072])), tie_embeddings=draw(st.booleans()))
    machine = draw(st.sampled_from([MACHINE, BF16_MACHINE, GPU_MACHINE, with_gpu(8, 7.5)]))
    try:
        resolved = resolve(args, model, machine)  # type: ignore[arg-type]
    except RequestError as error:
        assert error.code and error.param
        return
    scheduler, cache = resolved.config.scheduler, resolved.config.cache
    assert scheduler.step_tokens >= scheduler.max_running >= 1
    assert 1 <= scheduler.max_context <= min(cache.num_tokens, model.max_position)
    assert resolved.memory.needed <= resolved.memory.available
    assert set(field_names(resolved.config)) <= set(resolved.reasons)
    assert EngineConfig.from_json(resolved.config.to_json()) == resolved.config


def test_files_that_are_not_there_are_told_before_anything_is_loaded() -> None:
    for flags in ({"chat_template": "/no/such.jinja"}, {"tokenizer_path": "/no/such"}):
        with pytest.raises(RequestError) as caught:
            load_config(Args(**flags))  # type: ignore[arg-type]
        assert caught.value.code == "file_not_found" and "/no/such" in caught.value.message


def test_what_several_processes_cannot_share_is_refused() -> None:
    for args, flag in (
        (Args(tokenizer_worker_num=2, response_store_size=1), "--response-store-size"),
        (Args(tokenizer_worker_num=4, max_concurrent_requests=3), "--max-concurrent-requests"),
    ):
        error = refusal(args)
        assert error.code == "conflicting_flags" and error.param == flag
    config = resolve(Args(tokenizer_worker_num=2, response_store_size=0), spec(), MACHINE).config
    assert config.server.processes == 2 and config.server.response_store_bytes == 0
    assert resolve(Args(), spec(), MACHINE).config.server.response_store_bytes > 0
