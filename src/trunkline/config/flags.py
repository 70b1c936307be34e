"""The flags of an engine and its server, as data. Names and defaults are those of SGLang where it has them.

`Args` is the whole table: one attribute per flag (`--page-size` is `page_size`), with its default, bounds,
help and the configuration fields it decides in the metadata. The command line, `Engine(**kwargs)`, the help
text and the reference in the docs are all made from it. None: `config/resolve.py` derives the value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["text", "int", "float", "bool", "size", "path"]
Value = str | int | float | bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """How one flag is written and what it may be. `sets` names configuration fields; it is empty for a flag
    of a command (bench, chat, make-model)."""

    kind: Kind
    help: str
    sets: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # further spellings, with dashes
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    also: tuple[float, ...] = ()  # values allowed outside of [low, high]
    metavar: str = ""
    group: str = ""


def flag(
    kind: Kind,
    help: str,
    *,
    default: Value = None,
    sets: str = "",
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    also: tuple[float, ...] = (),
    metavar: str = "",
    group: str = "",
) -> Any:
    """A dataclass field that is a command-line flag. `sets`: configuration fields, separated by blanks."""
    if kind == "bool" and default is None:
        default = False
    meta = Flag(
        kind=kind, help=help, sets=tuple(sets.split()), aliases=aliases, choices=choices,
        low=low, high=high, also=also, metavar=metavar, group=group,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata={"flag": meta})


def flags_of(table: type) -> Mapping[str, Flag]:
    """The flags that a dataclass declares: attribute name -> Flag, in order."""
    return {f.name: f.metadata["flag"] for f in dataclasses.fields(table) if "flag" in f.metadata}


def again(table: type, attribute: str, default: Value) -> Any:
    """The flag of another table, with another default."""
    return dataclasses.field(default=default, metadata={"flag": flags_of(table)[attribute]})


def spelling(attribute: str) -> str:
    """`page_size` -> `--page-size`."""
    return "--" + attribute.replace("_", "-")


DTYPES = ("auto", "float32", "float", "bfloat16")
# The names in `text/reasoning.py` and `server/tools/formats.py`; a test holds them equal.
REASONING_PARSERS = (
    "auto", "none", "gpt-oss", "kimi_k2", "kimi", "mistral", "qwen3", "deepseek-v3", "deepseek-r1",
    "qwen3-thinking", "glm45", "interns1", "nemotron_3", "minimax", "step3",
)  # fmt: skip
TOOL_CALL_PARSERS = (
    "auto", "none", "gpt-oss", "deepseekv32", "deepseekv3", "deepseekv31", "kimi_k2", "mistral",
    "qwen3_coder", "minimax-m2", "glm47", "glm45", "glm", "hermes", "qwen", "qwen25", "interns1",
    "hunyuan", "lfm2", "pythonic", "llama3", "json",
)  # fmt: skip
ENGINE_GROUPS = ("model", "memory", "scheduling", "server", "observability")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What the user asked for, checked for type and range flag by flag; not yet resolved."""

    model_path: str | None = flag(
        "text", "model: a folder in Hugging Face layout, or a hub id where a hub is reachable. "
        "Default: the bundled model, seedling", sets="model.path", aliases=("--model",), group="model",
    )  # fmt: skip
    tokenizer_path: str | None = flag(
        "text", "folder of tokenizer.json, if not the model's", sets="model.tokenizer_path", group="model"
    )
    revision: str | None = flag(
        "text", "branch, tag or commit of a hub id", sets="model.revision", group="model"
    )
    dtype: str = flag(
        "text", "of weights and activations. auto: the checkpoint's own, or float32 on a CPU without "
        "bfloat16 arithmetic", default="auto", choices=DTYPES, sets="model.dtype cache.kv_dtype",
        group="model",
    )  # fmt: skip
    kv_cache_dtype: str = flag(
        "text", "of keys and values in the pool. auto: as --dtype; bfloat16 or bf16; int8: rounded, with a "
        "scale for each head of each token: nearly twice the tokens of bfloat16", default="auto",
        choices=("auto", "bf16", "bfloat16", "int8"), sets="cache.kv_dtype", group="memory",
    )  # fmt: skip
    quantization: str | None = flag(
        "text", "round the weights of linear layers as they are loaded: to 8 bits (a scale for each output) "
        "or to 4 (a scale for each group of inputs; 8 in the output head); activations are rounded to 8 bits "
        "where they meet them. Default: not at all", choices=("int8", "int4"), sets="model.quantization",
        group="model",
    )  # fmt: skip
    quantization_group_size: int = flag(
        "int", "inputs that share a scale, with --quantization int4; a multiple of 8", default=32,
        sets="model.quantization_group", low=8, high=1024, group="model",
    )  # fmt: skip
    device: str = flag(
        "text", "where to compute. auto: an NVIDIA GPU if there is one", default="auto",
        choices=("auto", "cpu", "cuda"), sets="model.device", group="model",
    )  # fmt: skip
    cpu_threads: int | None = flag(
        "int", "threads of the CPU operations. Default: OMP_NUM_THREADS, else the cores this process may use",
        sets="model.threads", low=1, high=1024, group="model",
    )  # fmt: skip
    context_length: int | None = flag(
        "int", "most tokens of prompt and output together. Default: the model's, or what the KV pool holds",
        sets="scheduler.max_context", low=2, group="model",
    )  # fmt: skip
    served_model_name: str | None = flag(
        "text", "the name that clients use. Default: the model path as given",
        sets="model.served_model_name", group="model",
    )  # fmt: skip
    weight_version: str = flag(
        "text", "label of the weights; part of every prefix cache key", default="default",
        sets="model.weight_version", group="model",
    )  # fmt: skip
    random_seed: int | None = flag(
        "int", "draws the seed of requests that carry none. Default: drawn at start", sets="model.seed",
        low=0, high=2**63 - 1, group="model",
    )  # fmt: skip
    pooling: str | None = flag(
        "text", "what embeddings are made of: the last token's hidden state, or the mean over all tokens. "
        "Default: what 1_Pooling/config.json in the model folder says, else last", choices=("last", "mean"),
        sets="model.pooling", group="model",
    )  # fmt: skip

    page_size: int = flag(
        "int", "tokens of one KV page, the unit of prefix sharing", default=16, sets="cache.page_size",
        low=1, high=1024, group="memory",
    )  # fmt: skip
    max_total_tokens: int | None = flag(
        "int", "tokens that the KV pool holds. Default: max-running-requests x context-length, as far as "
        "memory goes", sets="cache.num_pages", low=2, group="memory",
    )  # fmt: skip
    kv_memory: int | None = flag(
        "size", "size of the KV pool in bytes, e.g. 4GiB (instead of --max-total-tokens)",
        sets="cache.num_pages", metavar="SIZE", low=1, group="memory",
    )  # fmt: skip
    mem_fraction_static: float | None = flag(
        "float", "cap: weights and KV pool together take at most this share of the device's memory",
        sets="cache.num_pages", low=0.01, high=1.0, group="memory",
    )  # fmt: skip
    disable_radix_cache: bool = flag(
        "bool", "compute every prompt from its first token", sets="cache.prefix_cache scheduler.prefill_wait",
        group="memory",
    )  # fmt: skip

    max_running_requests: int | None = flag(
        "int", "requests computed at once. Default: 64 on a CPU, 256 on a GPU", sets="scheduler.max_running",
        low=1, high=4096, group="scheduling",
    )  # fmt: skip
    max_queued_requests: int = flag(
        "int", "requests that may wait; more are refused with 429", default=1024, sets="scheduler.max_queued",
        low=1, group="scheduling",
    )  # fmt: skip
    max_queued_tokens: int | None = flag(
        "int", "tokens of prompts that may wait; more are refused with 429. Default: 16 times what the KV "
        "pool holds", sets="scheduler.max_queued_tokens", low=1, group="scheduling",
    )  # fmt: skip
    request_waiting_timeout: float = flag(
        "float", "seconds that a request may wait for its first step before it is refused with 503; 0: any",
        default=0.0, sets="scheduler.waiting_timeout", low=0.0, high=86400.0, group="scheduling",
    )  # fmt: skip
    request_running_timeout: float = flag(
        "float", "seconds from its first step after which a request ends with 504; 0: any", default=0.0,
        sets="scheduler.running_timeout", low=0.0, high=86400.0, group="scheduling",
    )  # fmt: skip
    enable_priority_scheduling: bool = flag(
        "bool", "let requests take the place of running ones of much lower priority, which go on later. "
        "Without it, priority only orders those that wait", sets="scheduler.preempt_above",
        group="scheduling",
    )  # fmt: skip
    priority_scheduling_preemption_threshold: int = flag(
        "int", "difference of priority that must be exceeded for that", default=10,
        sets="scheduler.preempt_above", low=0, group="scheduling",
    )  # fmt: skip
    disable_priority_preemption: bool = flag(
        "bool", "let priority only order those that wait", sets="scheduler.preempt_above", group="scheduling"
    )
    schedule_low_priority_values_first: bool = flag(
        "bool", "lower values of priority come first", sets="scheduler.low_priority_first",
        group="scheduling",
    )  # fmt: skip
    default_priority_value: int = flag(
        "int", "priority of requests that name none", default=0, sets="scheduler.default_priority",
        low=-(2**31), high=2**31 - 1, group="scheduling",
    )  # fmt: skip
    abort_on_priority_when_disabled: bool = flag(
        "bool", "refuse requests that name a priority, unless --enable-priority-scheduling is given",
        sets="scheduler.refuse_priority", group="scheduling",
    )  # fmt: skip
    chunked_prefill_size: int | None = flag(
        "int", "most tokens of one step; longer prompts are computed in chunks. -1: whole prompts. "
        "Default: 512 on a CPU, 2048 to 16384 by memory on a GPU", sets="scheduler.step_tokens", low=1,
        also=(-1,), group="scheduling",
    )  # fmt: skip
    max_prefill_tokens: int = flag(
        "int", "bound on the tokens of one step whatever the chunk size; a whole prompt may exceed it",
        default=16384, sets="scheduler.step_tokens", low=1, group="scheduling",
    )  # fmt: skip
    schedule_policy: str = flag(
        "text", "order of admission: first come, or longest cached prefix", default="fcfs",
        choices=("fcfs", "lpm"), sets="scheduler.policy", group="scheduling",
    )  # fmt: skip
    schedule_conservativeness: float = flag(
        "float", "scales the memory kept for outputs at admission; higher admits later and preempts less",
        default=1.0, sets="scheduler.conservativeness", low=0.0, high=10.0, group="scheduling",
    )  # fmt: skip
    mix: str | None = flag(
        "text", "may prompt chunks share a step with requests that generate. Default: always",
        choices=("always", "never"), sets="scheduler.mix", group="scheduling",
    )  # fmt: skip
    enable_mixed_chunk: bool = flag("bool", "same as --mix always", sets="scheduler.mix", group="scheduling")
    overlap_depth: int | None = flag(
        "int", "steps launched before the tokens of the last one are known. Default: 1 on a GPU, 0 on a CPU",
        sets="scheduler.depth", low=0, high=2, group="scheduling",
    )  # fmt: skip
    disable_overlap_schedule: bool = flag(
        "bool", "same as --overlap-depth 0", sets="scheduler.depth", group="scheduling"
    )

    grammar_backend: str = flag(
        "text", "what enforces JSON schemas, regexes and grammars; none refuses them", default="llguidance",
        choices=("llguidance", "xgrammar", "none"), sets="grammar.backend", group="scheduling",
    )  # fmt: skip
    disable_jump_forward: bool = flag(
        "bool", "sample every token of a constrained output, also where the grammar leaves no choice",
        sets="grammar.jump_forward", group="scheduling",
    )  # fmt: skip

    host: str = flag("text", "address to listen on", default="127.0.0.1", sets="server.host", group="server")
    port: int = flag(
        "int", "port to listen on", default=30000, sets="server.port", low=1, high=65535, group="server"
    )
    uds: str | None = flag(
        "text", "listen on a Unix socket at this path, instead of an address and port", sets="server.uds",
        metavar="PATH", group="server",
    )  # fmt: skip
    fastapi_root_path: str | None = flag(
        "text", "path under which a proxy shows the server, such as /llm; requests may carry it or not",
        sets="server.root_path", metavar="PATH", group="server",
    )  # fmt: skip
    api_key: str | None = flag(
        "text", "required from clients, as a Bearer token or in x-api-key. @FILE: the file's text, "
        "which process lists do not show", sets="server.api_key", metavar="KEY", group="server",
    )  # fmt: skip
    admin_api_key: str | None = flag(
        "text", "required, instead of --api-key, on routes that steer the server; @FILE as there",
        sets="server.admin_api_key", metavar="KEY", group="server",
    )  # fmt: skip
    cors_allow_origin: str | None = flag(
        "text", "origins whose pages may use the server from a browser, such as https://a.example, separated "
        "by commas; * for all. Default: none", sets="server.cors_allow_origins", metavar="ORIGINS",
        group="server",
    )  # fmt: skip
    ssl_certfile: str | None = flag(
        "path", "certificate chain (PEM): serve HTTPS", sets="server.ssl_certfile", group="server"
    )
    ssl_keyfile: str | None = flag(
        "path", "private key of the certificate, if --ssl-certfile does not hold it",
        sets="server.ssl_keyfile", group="server",
    )  # fmt: skip
    ssl_keyfile_password: str | None = flag(
        "text", "of the private key; @FILE: the file's text", sets="server.ssl_keyfile_password",
        metavar="PASSWORD", group="server",
    )  # fmt: skip
    ssl_ca_certs: str | None = flag(
        "path", "certificates (PEM) of which one must have signed the client's: clients without one are "
        "turned away", sets="server.ssl_ca_certs", group="server",
    )  # fmt: skip
    max_concurrent_requests: int | None = flag(
        "int", "HTTP requests in progress; more are refused with 429. Default: twice the requests that run "
        "and wait", sets="server.max_concurrent", low=1, group="server",
    )  # fmt: skip
    tokenizer_worker_num: int = flag(
        "int", "API processes that share the address and the engine: they do HTTP, templates, tokens to text",
        default=1, sets="server.processes", low=1, high=64, group="server",
    )  # fmt: skip
    max_body_size: int = flag(
        "size", "largest request body", default=32 * 2**20, sets="server.max_body", low=1024,
        high=2**31, metavar="SIZE", group="server",
    )  # fmt: skip
    drain_timeout: float = flag(
        "float", "seconds that requests in progress get after SIGTERM or SIGINT; a second one ends at once",
        default=30.0, sets="server.drain_timeout", low=0.0, high=86400.0, group="server",
    )  # fmt: skip
    chat_template: str | None = flag(
        "path", "Jinja file that replaces the model folder's chat template", sets="server.chat_template",
        group="server",
    )  # fmt: skip
    reasoning_parser: str = flag(
        "text", "how the model marks its reasoning, which is told apart from the answer. auto: what the "
        "chat template shows; none: reasoning is left in the answer", default="auto",
        choices=REASONING_PARSERS, sets="server.reasoning_parser", group="server",
    )  # fmt: skip
    tool_call_parser: str = flag(
        "text", "how the model writes tool calls. auto: what the chat template shows; none: calls are left "
        "in the answer", default="auto", choices=TOOL_CALL_PARSERS, sets="server.tool_call_parser",
        group="server",
    )  # fmt: skip
    response_store_size: int | None = flag(
        "size", "most bytes of stored responses, in memory; the oldest leave first; 0 stores none. Default: "
        "256MiB; 0 with several API processes",
        sets="server.response_store_bytes", metavar="SIZE", low=0, group="server",
    )  # fmt: skip
    file_storage_path: str | None = flag(
        "path", "folder of uploaded files and batches; made on first use. Default: trunkline/files in the "
        "user's data folder", sets="server.file_storage_path", group="server",
    )  # fmt: skip
    file_storage_size: int = flag(
        "size", "most bytes of all files of /v1/files and results of batches together; 0 refuses both",
        default=10 * 2**30, sets="server.file_storage_bytes", metavar="SIZE", low=0, group="server",
    )  # fmt: skip
    max_batch_requests: int | None = flag(
        "int", "lines of batches computed at once; interactive requests go first. Default: half of "
        "--max-running-requests", sets="server.batch_running", low=1, high=4096, group="server",
    )  # fmt: skip
    sampling_defaults: str = flag(
        "text", "what fills absent sampling fields: the model's generation_config.json, or OpenAI's defaults",
        default="model", choices=("model", "openai"), sets="server.sampling_defaults", group="server",
    )  # fmt: skip
    log_level: str = flag(
        "text", "least severe messages to print", default="info", choices=LOG_LEVELS, sets="server.log_level",
        group="server",
    )  # fmt: skip
    max_sessions: int = flag(
        "int", "sessions that may be open at once", default=1024, sets="server.max_sessions", low=0,
        high=1_000_000, group="server",
    )  # fmt: skip
    max_session_tokens: int = flag(
        "int", "tokens that all sessions together may store, 4 bytes each", default=1 << 24,
        sets="server.max_session_tokens", low=1, group="server",
    )  # fmt: skip
    session_timeout: float = flag(
        "float", "seconds without use after which a session is closed", default=600.0,
        sets="server.session_timeout", low=1.0, high=604800.0, group="server",
    )  # fmt: skip
    watchdog_timeout: float = flag(
        "float", "seconds without progress after which the engine is declared dead", default=300.0,
        sets="server.watchdog_timeout", low=1.0, high=86400.0, group="server",
    )  # fmt: skip

    log_format: str = flag(
        "text", "text for people, or one JSON object a line", default="text", choices=("text", "json"),
        sets="observe.log_format", group="observability",
    )  # fmt: skip
    log_requests: bool = flag(
        "bool", "log each request and what came of it", sets="observe.log_requests", group="observability"
    )
    log_requests_level: int = flag(
        "int", "0: ids and counts, 1: and parameters, 2: and the beginnings of prompts and outputs, 3: and "
        "the whole of them", default=2, sets="observe.log_requests_level", low=0, high=3,
        group="observability",
    )  # fmt: skip
    log_requests_format: str | None = flag(
        "text", "of the lines of --log-requests. Default: as --log-format", choices=("text", "json"),
        sets="observe.log_requests_format", group="observability",
    )  # fmt: skip
    crash_dump_folder: str | None = flag(
        "text", "when the engine or the server dies, write the requests of the last 5 minutes there, for "
        "`trunkline replay`", sets="observe.crash_dump_folder", metavar="FOLDER", group="observability",
    )  # fmt: skip
    crash_dump_prompts: bool = flag(
        "bool", "dumps hold whole request bodies, prompts included; without it only their shapes",
        sets="observe.crash_dump_prompts", group="observability",
    )  # fmt: skip
    metrics_aliases: str = flag(
        "text", "export each metric a second time, under the name that dashboards for SGLang know",
        default="none", choices=("none", "sglang"), sets="observe.metrics_aliases", group="observability",
    )  # fmt: skip
    bucket_time_to_first_token: str | None = flag(
        "text", "bounds of the histogram in seconds, separated by commas, e.g. 0.1,0.5,1",
        sets="observe.first_token_buckets", metavar="LIST", group="observability",
    )  # fmt: skip
    bucket_inter_token_latency: str | None = flag(
        "text", "bounds of the histogram in seconds, separated by commas",
        sets="observe.between_tokens_buckets", metavar="LIST", group="observability",
    )  # fmt: skip
    bucket_e2e_request_latency: str | None = flag(
        "text", "bounds of the histogram in seconds, separated by commas", sets="observe.request_buckets",
        metavar="LIST", group="observability",
    )  # fmt: skip
    allow_unknown_fields: bool = flag(
        "bool", "ignore fields of a body that no route knows, naming them in the log and in the header "
        "x-ignored-fields. Without it they are refused", sets="observe.allow_unknown_fields",
        group="observability",
    )  # fmt: skip
    profile_folder: str | None = flag(
        "text", "where /start_profile may write, and below. Default: the system's folder for temporary files",
        sets="observe.profile_folder", metavar="FOLDER", group="observability",
    )  # fmt: skip
    enable_trace: bool = flag(
        "bool", "send OpenTelemetry traces of each request; needs trunkline[otel]", sets="observe.trace",
        group="observability",
    )  # fmt: skip
    otlp_traces_endpoint: str = flag(
        "text", "host:port of the OTLP collector (gRPC)", default="localhost:4317",
        sets="observe.otlp_endpoint", group="observability",
    )  # fmt: skip
    enable_prefix_miss_tokens: bool = flag(
        "bool", "prefix-miss reports show the cached tokens that a prompt differs from, which other clients "
        "may have sent. Without it, only requests with a cache_salt or extra_key of their own see them",
        sets="observe.prefix_miss_tokens", group="observability",
    )  # fmt: skip

    accepted: tuple[str, ...] = ()  # flags of the reference that ask for what is always so
