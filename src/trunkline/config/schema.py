"""The configuration tree: frozen groups of plain values, resolved once before anything is loaded.

No field means "automatic": `config/resolve.py` has put a value in each and recorded why. The tree crosses the
process boundary to the engine core as JSON, so every field is a plain value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from trunkline.types import Pooling

Device = Literal["cpu", "cuda"]
DType = Literal["float32", "bfloat16"]
Mix = Literal["always", "never"]
Policy = Literal["fcfs", "lpm"]
GrammarBackendName = Literal["llguidance", "xgrammar", "none"]
Weights = Literal["plain", "int8", "int4"]

KVType = Literal["float32", "bfloat16", "int8"]

DTYPE_BYTES: Mapping[DType, int] = {"float32": 4, "bfloat16": 2}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which weights, and how they are computed."""

    path: str  # a folder in Hugging Face layout
    tokenizer_path: str = ""  # folder of tokenizer.json; "": `path`
    dtype: DType = "float32"  # of weights and activations
    quantization: Weights = "plain"  # what linear layers hold; int4 has an int8 output head
    quantization_group: int = 32  # inputs that share a scale, of int4
    device: Device = "cpu"
    threads: int = 1  # CPU threads of the worker's operations
    load_format: Literal["safetensors"] = "safetensors"
    served_model_name: str = "default"  # the name clients use
    weight_version: str = "default"  # part of every cache key (P13)
    revision: str | None = None  # of a hub id
    seed: int = 0  # draws the seed of requests that carry none
    pooling: Pooling = "last"  # what embeddings are made of


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The pool of KV pages. One page holds `page_size` tokens of all layers."""

    page_size: int = 16  # tokens
    num_pages: int = 256
    kv_dtype: KVType = "float32"  # int8: with a bfloat16 scale for each head of each token
    prefix_cache: bool = True  # keep finished pages and reuse them for equal prefixes

    @property
    def num_tokens(self) -> int:
        return self.page_size * self.num_pages


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How steps are composed. `resolve` guarantees `step_tokens >= max_running`."""

    max_running: int = 16  # rows: requests that hold KV at once
    step_tokens: int = 256  # most tokens of one forward pass
    max_context: int = 1024  # most tokens of prompt + output of one request
    mix: Mix = "always"  # may prompt chunks and single-token rows share a step
    policy: Policy = "fcfs"  # order of admission
    conservativeness: float = 1.0  # scales the share of expected output reserved at admission
    max_queued: int = 1024  # waiting requests; more are refused with 429
    depth: int = 0  # steps launched ahead of the one whose tokens are known
    max_queued_tokens: int = 2**31  # of prompts that wait; more are refused with 429
    waiting_timeout: float = 0.0  # seconds that a request may wait for its first step; 0: as long as it takes
    running_timeout: float = 0.0  # seconds from its first step to its last token; 0: as long as it takes
    preempt_above: int | None = None  # a request takes the place of one whose priority is lower by more
    low_priority_first: bool = False  # lower values come first
    default_priority: int = 0  # of requests that name none
    refuse_priority: bool = False  # requests may not name one
    prefill_wait: bool = True  # wait for a prefix that another request is computing


class GrammarConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Structured output."""

    backend: GrammarBackendName = "llguidance"
    jump_forward: bool = True  # tokens that a grammar dictates are appended without a step for each


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = 30000
    uds: str | None = None  # listen on this Unix socket instead
    root_path: str = ""  # prefix that a proxy may leave in paths
    api_key: str | None = None
    admin_api_key: str | None = None  # for routes that steer; None: api_key opens them too
    cors_allow_origins: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None  # clients must have a certificate that one of these signed
    max_concurrent: int = 4096  # HTTP requests in progress
    processes: int = 1  # that do HTTP, before one engine
    max_body: int = 32 * 2**20  # bytes
    drain_timeout: float = 30.0  # seconds for requests in progress when the server is told to stop
    chat_template: str | None = None  # file that replaces the model folder's template
    reasoning_parser: str = "auto"  # how reasoning is told apart: a name, "auto" by the template, "none"
    tool_call_parser: str = "auto"  # the format of tool calls, likewise
    sampling_defaults: Literal["model", "openai"] = "model"  # whose defaults fill absent sampling fields
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    max_sessions: int = 1024  # open at once
    max_session_tokens: int = 1 << 24  # that all of them store
    session_timeout: float = 600.0  # seconds without use after which a session is closed
    response_store_bytes: int = 256 * 2**20  # all stored responses together
    file_storage_path: str = ""  # folder of files and batches; "": there is none
    file_storage_bytes: int = 10 * 2**30  # all files and results of batches together
    batch_running: int = 8  # lines of batches in progress at once
    watchdog_timeout: float = 300.0  # seconds without progress after which the core is declared dead


SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")  # fields of ServerConfig never shown


class ObserveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What operators and users can look at."""

    log_format: Literal["text", "json"] = "text"
    log_requests: bool = False
    log_requests_level: int = 2  # 0: counts, 1: + parameters, 2: + beginnings of texts, 3: + whole texts
    log_requests_format: Literal["text", "json"] = "text"
    crash_dump_folder: str | None = None
    crash_dump_prompts: bool = False
    metrics_aliases: Literal["none", "sglang"] = "none"
    first_token_buckets: tuple[float, ...] = ()  # seconds; (): the built-in ones
    between_tokens_buckets: tuple[float, ...] = ()
    request_buckets: tuple[float, ...] = ()
    allow_unknown_fields: bool = False
    profile_folder: str | None = None  # profiles are written there or below; None: the system's temporary one
    trace: bool = False
    otlp_endpoint: str = "localhost:4317"
    prefix_miss_tokens: bool = False  # reports may show tokens of other requests' prompts


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that an engine and its server need to start."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    grammar: GrammarConfig = GrammarConfig()
    server: ServerConfig = ServerConfig()
    observe: ObserveConfig = ObserveConfig()

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes | str) -> EngineConfig:
        """Raises msgspec.ValidationError on an unknown field or a wrong type."""
        return msgspec.json.decode(data, type=cls)
