"""The table of flags: every flag does something, and nothing is accepted by mistake (P2)."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tests.pure.config_cases import GPU_MACHINE, MACHINE, spec
from trunkline.config.cli import from_kwargs, help_text, parse, parse_size
from trunkline.config.flags import Args, flags_of, spelling
from trunkline.config.reference import ALWAYS_SO, SAME_FLAG, refused_flags
from trunkline.config.resolve import resolve
from trunkline.types import RequestError

FLAGS = flags_of(Args)

# One other value for each flag, as it is written on a command line.
OTHER_VALUE = {
    "model_path": "other",
    "tokenizer_path": "elsewhere",
    "revision": "v2",
    "pooling": "mean",
    "dtype": "bfloat16",
    "quantization": "int8",
    "quantization_group_size": "128",
    "device": "cpu",
    "cpu_threads": "3",
    "context_length": "512",
    "served_model_name": "name",
    "weight_version": "v7",
    "random_seed": "5",
    "page_size": "8",
    "max_total_tokens": "4096",
    "kv_memory": "64MiB",
    "mem_fraction_static": "0.3",
    "disable_radix_cache": None,
    "kv_cache_dtype": "int8",
    "max_running_requests": "9",
    "max_queued_requests": "7",
    "max_queued_tokens": "777",
    "request_waiting_timeout": "3",
    "request_running_timeout": "4.5",
    "enable_priority_scheduling": None,
    "priority_scheduling_preemption_threshold": "3",
    "disable_priority_preemption": None,
    "schedule_low_priority_values_first": None,
    "default_priority_value": "2",
    "abort_on_priority_when_disabled": None,
    "chunked_prefill_size": "128",
    "max_prefill_tokens": "100",
    "schedule_policy": "lpm",
    "schedule_conservativeness": "0.5",
    "mix": "never",
    "enable_mixed_chunk": None,
    "overlap_depth": "2",
    "disable_overlap_schedule": None,
    "grammar_backend": "none",
    "disable_jump_forward": None,
    "host": "0.0.0.0",
    "port": "8000",
    "api_key": "secret",
    "admin_api_key": "other",
    "uds": "a.sock",
    "fastapi_root_path": "/llm",
    "cors_allow_origin": "https://a.example, http://b.example:81",
    "ssl_certfile": "cert.pem",
    "ssl_keyfile": "key.pem",
    "ssl_keyfile_password": "open",
    "ssl_ca_certs": "ca.pem",
    "max_concurrent_requests": "5",
    "tokenizer_worker_num": "3",
    "max_body_size": "1MiB",
    "drain_timeout": "3",
    "chat_template": "file.jinja",
    "reasoning_parser": "qwen3",
    "tool_call_parser": "hermes",
    "sampling_defaults": "openai",
    "log_level": "error",
    "max_sessions": "7",
    "max_session_tokens": "1000",
    "session_timeout": "60",
    "response_store_size": "0",
    "file_storage_path": "/data/files",
    "file_storage_size": "1GiB",
    "max_batch_requests": "3",
    "watchdog_timeout": "5",
    "log_format": "json",
    "log_requests": None,
    "log_requests_level": "3",
    "log_requests_format": "json",
    "crash_dump_folder": "dumps",
    "crash_dump_prompts": None,
    "metrics_aliases": "sglang",
    "allow_unknown_fields": None,
    "profile_folder": "profiles",
    "enable_trace": None,
    "otlp_traces_endpoint": "collector:4317",
    "bucket_time_to_first_token": "0.1,0.5",
    "bucket_inter_token_latency": "0.01,0.02",
    "bucket_e2e_request_latency": "1,10",
    "enable_prefix_miss_tokens": None,
}


NEEDS = dict.fromkeys(
    ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"), ("--ssl-certfile", "cert.pem")
)  # flags that only go with others
NEEDS["priority_scheduling_preemption_threshold"] = ("--enable-priority-scheduling",)


def words(attribute: str) -> list[str]:
    value = OTHER_VALUE[attribute]
    own = [spelling(attribute)] if value is None else [spelling(attribute), value]
    return [*own, *NEEDS.get(attribute, ())]


def refusal(argv: list[str]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(argv, Args)
    return caught.value


def test_the_cases_cover_the_table() -> None:
    assert set(OTHER_VALUE) == set(FLAGS)


@pytest.mark.parametrize("attribute", FLAGS)
def test_every_flag_changes_what_it_says_it_sets(attribute: str) -> None:
    machine = GPU_MACHINE if attribute in ("device", "disable_overlap_schedule") else MACHINE
    base = resolve(Args(), spec(), machine)
    args = parse(words(attribute), Args)
    other = resolve(args, spec(path=args.model_path or spec().path), machine)
    named = FLAGS[attribute].sets
    assert named
    for name in named:
        group, field = name.split(".")
        before, after = (getattr(getattr(r.config, group), field) for r in (base, other))
        # Asking for what holds anyway still shows in the reasons.
        so_anyway = ("enable_mixed_chunk", "disable_priority_preemption")
        assert before != after or attribute in so_anyway, name
        assert base.reasons[name] != other.reasons[name], name


@pytest.mark.parametrize("attribute", FLAGS)
def test_keyword_arguments_mean_the_same_as_words(attribute: str) -> None:
    value = OTHER_VALUE[attribute]
    own = [spelling(attribute)] if value is None else [spelling(attribute), value]
    assert from_kwargs({attribute: True if value is None else value}, Args) == parse(own, Args)


@pytest.mark.parametrize("attribute", [a for a, f in FLAGS.items() if f.low is not None])
def test_bounds_hold(attribute: str) -> None:
    meta = FLAGS[attribute]
    assert meta.low is not None
    step = 1 if meta.kind in ("int", "size") else 0.001
    for value in (meta.low, meta.high, *meta.also):
        if value is not None:
            text = str(int(value) if meta.kind in ("int", "size") else value)
            assert getattr(parse([spelling(attribute), text], Args), attribute) == value
    outside = [meta.low - step] + ([] if meta.high is None else [meta.high + step])
    for value in outside:
        text = f"{value:.4f}" if meta.kind == "float" else str(int(value))
        if meta.kind == "int" and meta.high == 2**63 - 1 and value > 0:
            text = str(2**63)
        error = refusal([f"{spelling(attribute)}={text}"])
        assert error.code == "invalid_flag" and error.param == spelling(attribute)


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e3", "nan", "0x10"])
def test_whole_numbers_only(text: str) -> None:
    assert refusal(["--page-size", text]).code == "invalid_flag"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1,5"])
def test_shares_are_plain_numbers(text: str) -> None:
    assert refusal(["--mem-fraction-static", text]).code == "invalid_flag"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5k", 1536),
        ("77", 77),
        (" 2 TiB ", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_spellings() -> None:
    assert parse(["--model=a"], Args).model_path == parse(["--model-path", "a"], Args).model_path == "a"
    assert parse(["--port", "1", "--port", "2"], Args).port == 2
    assert parse(["--chunked-prefill-size", "-1"], Args).chunked_prefill_size == -1
    assert refusal(["--api-key="]).code == "invalid_flag"


def test_slips_are_told_apart() -> None:
    assert "did you mean --page-size" in refusal(["--pagesize", "3"]).message
    assert refusal(["--page"]).code == "unknown_flag"  # no silent abbreviation
    assert refusal(["--page-size"]).message == "--page-size needs a value"
    assert refusal(["--page-size", "--port", "1"]).message == "--page-size needs a value"
    assert refusal(["model"]).param == "model"
    assert refusal(["--disable-radix-cache=true"]).code == "invalid_flag"
    assert refusal(["--"]).code == "unknown_flag"
    assert "fcfs, lpm" in refusal(["--schedule-policy", "random"]).message


def test_every_known_flag_that_is_not_built_is_refused_with_a_reason() -> None:
    refused = refused_flags()
    assert len(refused) + len(FLAGS) > 550, "each flag of the reference is here or refused by name"
    for name, why in refused.items():
        for argv in ([name], [name, "x"], [f"{name}=x"]):
            error = refusal(argv)
            assert error.code == "unsupported_flag" and error.param == name
            assert why in error.message
    assert not set(refused) & {spelling(a) for a in FLAGS} and not set(refused) & set(ALWAYS_SO)


def test_parallel_sizes_of_one_are_accepted_and_others_refused_by_name() -> None:
    for name in ("--tp", "--tp-size", "--tensor-parallel-size", "--dp", "--pp-size", "--ep"):
        assert parse([name, "1"], Args).accepted == (f"{name} 1",)
        error = refusal([name, "2"])
        assert error.code == "unsupported_flag" and error.param == name and "2" in error.message


def test_what_always_holds_may_be_asked_for_and_its_contrary_may_not() -> None:
    for name, (values, fact) in ALWAYS_SO.items():
        for value in values:
            args = parse([name, value] if value else [name], Args)
            assert len(args.accepted) == 1
            assert resolve(args, spec(), MACHINE).reasons[name] == fact
        error = refusal([f"{name}=other"])
        assert error.code == "unsupported_flag" and fact in error.message
    for name, main in SAME_FLAG.items():
        assert main in ALWAYS_SO or main in refused_flags(), name


@pytest.mark.parametrize("value", ["fp8_e5m2", "fp8_e4m3", "mxfp8", "nvfp4", "fp4_mx_block16"])
def test_values_of_the_reference_that_are_not_built_are_refused_with_a_reason(value: str) -> None:
    error = refusal(["--kv-cache-dtype", value])
    assert error.code == "unsupported_flag" and error.param == "--kv-cache-dtype"
    assert f"{value} is not supported: no kernel" in str(error) and "int8" in str(error)
    assert refusal(["--kv-cache-dtype", "int4"]).code == "invalid_flag"


def test_keyword_arguments_of_what_is_not_built() -> None:
    assert from_kwargs({"enable_lora": False, "quantization": None, "tp_size": 1}, Args).accepted == (
        "--tp-size 1",
    )
    assert from_kwargs({"page_size": None}, Args) == Args()
    for kwargs, code in (
        ({"enable_lora": True}, "unsupported_flag"),
        ({"tp_size": 2}, "unsupported_flag"),
        ({"enable_metrics": False}, "unsupported_flag"),
        ({"pagesize": 4}, "unknown_flag"),
        ({"pagesize": None}, "unknown_flag"),
        ({"page_size": True}, "invalid_flag"),
        ({"page_size": 1.5}, "invalid_flag"),
        ({"port": "http"}, "invalid_flag"),
        ({"disable_radix_cache": 1}, "invalid_flag"),
        ({"host": 5}, "invalid_flag"),
    ):
        with pytest.raises(RequestError) as caught:
            from_kwargs(kwargs, Args)
        assert caught.value.code == code, kwargs


def test_help_names_every_flag_and_default() -> None:
    text = help_text("trunkline serve", "About.", Args)
    for attribute, meta in FLAGS.items():
        assert spelling(attribute) in text
        assert all(alias in text for alias in meta.aliases)
    assert "(default: 30000)" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "--port" not in help_text("x", "About.", Args, hide=["port"])


def test_defaults_are_inside_their_own_bounds() -> None:
    for f in fields(Args):
        meta = FLAGS.get(f.name)
        if meta is not None and f.default not in (None, False):
            assert getattr(parse([spelling(f.name), str(f.default)], Args), f.name) == f.default
