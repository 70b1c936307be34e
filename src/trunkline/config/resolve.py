"""From flags, model and machine to the configuration. `resolve` is pure and says why for every value."""

from __future__ import annotations

import dataclasses
import importlib.util
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from trunkline.config.compat import check_compatible
from trunkline.config.credentials import read_secrets
from trunkline.config.flags import Args, flags_of, spelling
from trunkline.config.folders import data_folder
from trunkline.config.hardware import Hardware, detect, share_cores
from trunkline.config.memory import Demand, MemoryPlan
from trunkline.config.observe import resolve_observe
from trunkline.config.pool import conflict, size_pool
from trunkline.config.reference import ALWAYS_SO, SAME_FLAG
from trunkline.config.schema import (
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    GrammarConfig,
    KVType,
    Mix,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    Weights,
)
from trunkline.types import RequestError

if TYPE_CHECKING:
    from trunkline.config.model_spec import ModelSpec

SEEDLING = Path(__file__).parent.parent / "assets" / "seedling"
QUEUED_POOLS = 16  # prompts that may wait, in KV pools: a bound on memory far beyond any useful wait
_QUANTIZATIONS: Mapping[str | None, Weights] = {None: "plain", "int8": "int8", "int4": "int4"}
_DTYPES: Mapping[str, DType] = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
}


@dataclass(frozen=True)
class Resolved:
    """A configuration, why each of its fields (dotted name) is what it is, and what it takes."""

    config: EngineConfig
    reasons: dict[str, str]
    memory: MemoryPlan
    derived: tuple[str, ...] = ()  # the fields that neither the user nor a fixed default decided

    def summary(self) -> str:
        """The derived values with their reasons, one to a line."""
        left = {name: f"{name} = {attrgetter(name)(self.config)}" for name in self.derived}
        width = max(map(len, left.values()), default=0)
        return "\n".join(f"  {text:<{width}}  {self.reasons[name]}" for name, text in left.items())


def load_config(args: Args) -> Resolved:
    """Read the model folder, look at the machine, resolve; prepare the process for its threads.

    Raises RequestError (flags, memory, device) and what `load_model_spec` raises for a broken folder.
    """
    from trunkline.config.model_spec import load_model_spec

    for attribute in ("tokenizer_path", "chat_template", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(args, attribute)
        if path is not None and not Path(path).exists():
            name = spelling(attribute)
            raise RequestError(f"{name}: there is no {path!r}", code="file_not_found", param=name)
    args = read_secrets(args)
    if args.grammar_backend == "xgrammar" and importlib.util.find_spec("xgrammar") is None:
        raise RequestError(
            "--grammar-backend xgrammar: the package is not installed; pip install 'trunkline[xgrammar]'",
            code="missing_package",
            param="--grammar-backend",
        )
    spec = load_model_spec(args.model_path or str(SEEDLING), revision=args.revision)
    share_cores()
    seed, storage = args.random_seed, args.file_storage_path
    folder = Path(storage) if storage else data_folder() / "trunkline" / "files"
    args = dataclasses.replace(args, file_storage_path=str(folder.absolute()))
    if seed is None:
        args = dataclasses.replace(args, random_seed=secrets.randbits(31))
    resolved = resolve(args, spec, detect())
    if seed is None:
        resolved.reasons["model.seed"] = "drawn at start; give --random-seed to repeat it"
    if storage is None:
        resolved.reasons["server.file_storage_path"] = "a folder of this user"
    return resolved


def resolve(args: Args, spec: ModelSpec, hardware: Hardware) -> Resolved:
    """Decide every value. Pure: the same three always give the same.

    Raises RequestError for contradicting flags, a device that is not there, too little memory.
    """
    why: dict[str, str] = {}
    device = _device(args, hardware, why)
    dtype = _dtype(args, spec, hardware, device, why)
    context = _context(args, spec)
    max_running, step_tokens = _step(args, hardware, device, context, why)
    demand = Demand(
        spec=spec,
        dtype=dtype,
        kv_dtype=_kv_dtype(args, dtype, why),
        device=device,
        page_size=args.page_size,
        max_running=max_running,
        max_context=context,
        step_tokens=step_tokens,
        native_kernels=device == "cpu" and hardware.native_kernels,
        threads=_threads(args, hardware, why),
        weight_bits=_weight_bits(args),
    )
    num_pages, plan = size_pool(args, demand, hardware, why)
    scheduler = _scheduler(args, demand, num_pages, why)
    config = EngineConfig(
        model=_model(args, demand, why),
        cache=CacheConfig(
            page_size=args.page_size,
            num_pages=num_pages,
            kv_dtype=demand.kv_dtype,
            prefix_cache=not args.disable_radix_cache,
        ),
        scheduler=scheduler,
        grammar=GrammarConfig(
            backend=args.grammar_backend,  # type: ignore[arg-type]  # the table has checked it
            jump_forward=not args.disable_jump_forward,
        ),
        server=_server(args, scheduler.max_running, why),
        observe=resolve_observe(args),
    )
    check_compatible(config)
    derived = tuple(name for name in field_names(config) if not why.get(name, "--").startswith("--"))
    return Resolved(config, _all_reasons(args, why), plan, derived)


def _model(args: Args, demand: Demand, why: dict[str, str]) -> ModelConfig:
    given = args.model_path
    if given is None:
        why["model.path"] = "the bundled model"
    if args.served_model_name is None:
        why["model.served_model_name"] = "the model path as given" if given else "the bundled model"
    if args.random_seed is None:
        why["model.seed"] = "zero without --random-seed"
    if args.pooling is None and demand.spec.pooling is not None:
        why["model.pooling"] = "1_Pooling/config.json"
    pooling = args.pooling or demand.spec.pooling or "last"
    if pooling not in ("last", "mean"):
        raise RequestError(
            f"1_Pooling/config.json in {demand.spec.path} asks for {pooling[:200]}, which is not built: name "
            "--pooling last or --pooling mean. Vectors then are not what the model was trained for; "
            "generated text does not depend on it",
            code="unsupported_pooling",
            param="pooling",
            status=500,
        )
    return ModelConfig(
        path=demand.spec.path,
        tokenizer_path=args.tokenizer_path or "",
        dtype=demand.dtype,
        quantization=_QUANTIZATIONS[args.quantization],
        quantization_group=args.quantization_group_size,
        device=demand.device,
        threads=demand.threads,
        served_model_name=args.served_model_name or given or "seedling",
        weight_version=args.weight_version,
        revision=args.revision,
        seed=args.random_seed or 0,
        pooling="mean" if pooling == "mean" else "last",
    )


def _threads(args: Args, hardware: Hardware, why: dict[str, str]) -> int:
    threads, reason = args.cpu_threads, "--cpu-threads"
    if threads is None and hardware.threads_wanted is not None:
        threads, reason = hardware.threads_wanted, "OMP_NUM_THREADS"
    elif threads is None:
        threads, reason = hardware.cores, "the cores that this process may use"
    why["model.threads"] = reason
    return threads


def _scheduler(args: Args, demand: Demand, num_pages: int, why: dict[str, str]) -> SchedulerConfig:
    """The demand's rows and context, cut to what the pool holds."""
    running, context = demand.max_running, min(demand.max_context, num_pages * args.page_size)
    if context < demand.max_context:
        why["scheduler.max_context"] = f"what the KV pool holds; the model goes to {demand.max_context:,}"
    elif args.context_length is None:
        why["scheduler.max_context"] = "the model's own limit"
    if args.max_running_requests is None and running > num_pages:
        running = num_pages
        why["scheduler.max_running"] = "one page for each: the KV pool has no more"
    queued_tokens = args.max_queued_tokens
    if queued_tokens is None:
        queued_tokens = QUEUED_POOLS * num_pages * args.page_size
        why["scheduler.max_queued_tokens"] = f"{QUEUED_POOLS} times what the KV pool holds"
    preempts = args.enable_priority_scheduling and not args.disable_priority_preemption
    return SchedulerConfig(
        max_running=running,
        step_tokens=demand.step_tokens,
        max_context=context,
        mix=_mix(args, why),
        policy="lpm" if args.schedule_policy == "lpm" else "fcfs",
        conservativeness=args.schedule_conservativeness,
        max_queued=args.max_queued_requests,
        depth=_depth(args, demand.device, why),
        max_queued_tokens=queued_tokens,
        waiting_timeout=args.request_waiting_timeout,
        running_timeout=args.request_running_timeout,
        preempt_above=args.priority_scheduling_preemption_threshold if preempts else None,
        low_priority_first=args.schedule_low_priority_values_first,
        default_priority=args.default_priority_value,
        refuse_priority=args.abort_on_priority_when_disabled and not args.enable_priority_scheduling,
        prefill_wait=not args.disable_radix_cache,
    )


def _server(args: Args, max_running: int, why: dict[str, str]) -> ServerConfig:
    """Raises RequestError for a key without a certificate, and for an origin or prefix that is none."""
    if args.ssl_certfile is None:
        for attribute in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(args, attribute) is not None:
                name = spelling(attribute)
                raise conflict(f"{name} needs --ssl-certfile: without it there is no TLS", name)
    concurrent = args.max_concurrent_requests
    if concurrent is None:
        concurrent = 2 * (max_running + args.max_queued_requests)
        why["server.max_concurrent"] = "twice the requests that run and wait"
    if concurrent < args.tokenizer_worker_num:
        raise conflict(
            f"{concurrent} requests in progress can't be shared out to {args.tokenizer_worker_num} API "
            "processes: each needs one at least",
            "--max-concurrent-requests",
        )
    return ServerConfig(
        host=args.host,
        port=args.port,
        uds=args.uds,
        root_path=_root_path(args.fastapi_root_path),
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        cors_allow_origins=_origins(args.cors_allow_origin),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ssl_keyfile_password=args.ssl_keyfile_password,
        ssl_ca_certs=args.ssl_ca_certs,
        max_concurrent=concurrent,
        processes=args.tokenizer_worker_num,
        max_body=args.max_body_size,
        drain_timeout=args.drain_timeout,
        chat_template=args.chat_template,
        reasoning_parser=args.reasoning_parser,
        tool_call_parser=args.tool_call_parser,
        sampling_defaults="openai" if args.sampling_defaults == "openai" else "model",
        log_level=args.log_level,  # type: ignore[arg-type]  # the table has checked it
        max_sessions=args.max_sessions,
        max_session_tokens=args.max_session_tokens,
        session_timeout=args.session_timeout,
        response_store_bytes=_response_store(args, why),
        file_storage_path=args.file_storage_path or "",
        file_storage_bytes=args.file_storage_size,
        batch_running=_batch_running(args, max_running, why),
        watchdog_timeout=args.watchdog_timeout,
    )


def _response_store(args: Args, why: dict[str, str]) -> int:
    """Raises RequestError for a store that several processes would have to share."""
    several = args.tokenizer_worker_num > 1
    if args.response_store_size is None:
        why["server.response_store_bytes"] = "API processes share no memory" if several else "256 MiB"
        return 0 if several else ServerConfig().response_store_bytes
    if several and args.response_store_size:
        raise conflict(
            "stored responses live in one process, and --tokenizer-worker-num is "
            f"{args.tokenizer_worker_num}: use one process, or --response-store-size 0",
            "--response-store-size",
        )
    return args.response_store_size


def _root_path(path: str | None) -> str:
    if path is None:
        return ""
    if not path.startswith("/"):
        raise RequestError(
            f"--fastapi-root-path must begin with a slash, not {path!r}",
            code="invalid_value",
            param="--fastapi-root-path",
        )
    return path.rstrip("/")


def _origins(text: str | None) -> tuple[str, ...]:
    origins = tuple(filter(None, (word.strip() for word in (text or "").split(","))))
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (
            parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"
        ):
            raise RequestError(
                f"--cors-allow-origin: {origin!r} is not an origin such as https://a.example:8443, "
                "which has no path",
                code="invalid_value",
                param="--cors-allow-origin",
            )
    return origins


def _batch_running(args: Args, max_running: int, why: dict[str, str]) -> int:
    if args.max_batch_requests is None:
        why["server.batch_running"] = "half of the requests computed at once"
        return max(1, max_running // 2)
    return min(args.max_batch_requests, max_running)


def field_names(config: EngineConfig) -> list[str]:
    """Dotted names of all values, such as "cache.page_size"."""
    groups = ((group, getattr(config, group)) for group in config.__struct_fields__)
    return [f"{group}.{name}" for group, value in groups for name in value.__struct_fields__]


def _device(args: Args, hardware: Hardware, why: dict[str, str]) -> Device:
    if args.device == "cpu":
        return "cpu"
    if args.device == "cuda":
        if hardware.cuda:
            return "cuda"
        torch = hardware.torch_version or "not installed"
        cause = f"torch is {torch}, without CUDA" if hardware.gpus else "nvidia-smi shows no NVIDIA GPU"
        raise RequestError(
            f"--device cuda cannot be had: {cause}; --device cpu works here, `trunkline doctor` says more",
            code="device_unavailable",
            param="--device",
        )
    if hardware.cuda:
        why["model.device"] = f"{hardware.gpus[0].name} is there"
        return "cuda"
    without = "torch is a build without CUDA" if hardware.gpus else "no NVIDIA GPU"
    why["model.device"] = without
    return "cpu"


def _dtype(args: Args, spec: ModelSpec, hardware: Hardware, device: Device, why: dict[str, str]) -> DType:
    asked = _DTYPES.get(args.dtype)
    if asked is not None:
        if asked == "bfloat16" and device == "cpu" and not hardware.packs_bfloat16:
            raise RequestError(
                f"--dtype bfloat16 cannot be had: this CPU ({hardware.cpu_name}) has no AVX-512 and "
                "the native kernels were not built; use float32",
                code="dtype_unavailable",
                param="--dtype",
            )
        return asked
    dtype: DType = "float32"
    if spec.dtype == "float32":
        reason = "the checkpoint's"
    elif spec.dtype != "bfloat16":
        reason = f"exact for the checkpoint's {spec.dtype}"
    elif device == "cuda" and hardware.gpus[0].capability < 8.0:
        reason = "this GPU has no bfloat16 arithmetic"
    elif device == "cpu" and not (hardware.fast_bfloat16 or hardware.native_kernels):
        reason = "without native kernels, this CPU multiplies bfloat16 (the checkpoint's) only slowly"
    else:
        dtype, reason = "bfloat16", "the checkpoint's"
    why["model.dtype"] = reason
    return dtype


def _kv_dtype(args: Args, dtype: DType, why: dict[str, str]) -> KVType:
    if args.kv_cache_dtype == "int8":
        return "int8"
    if args.kv_cache_dtype != "auto":
        return "bfloat16"
    why["cache.kv_dtype"] = "the same as the weights'" if args.dtype == "auto" else "the same as --dtype"
    return dtype


def _weight_bits(args: Args) -> float | None:
    """Of a rounded weight with its share of a scale; None: the dtype's. Raises RequestError."""
    size = args.quantization_group_size
    if size % 8:
        raise RequestError(
            f"--quantization-group-size {size} is not a multiple of 8",
            code="invalid_value",
            param="--quantization-group-size",
        )
    return {None: None, "int8": 8.0, "int4": 4 + 16 / size}[args.quantization]


def _context(args: Args, spec: ModelSpec) -> int:
    asked = args.context_length
    if asked is not None and asked > spec.max_position:
        raise RequestError(
            f"--context-length {asked} is beyond the model's {spec.max_position} positions",
            code="context_too_long",
            param="--context-length",
        )
    return asked or spec.max_position


def _step(
    args: Args, hardware: Hardware, device: Device, context: int, why: dict[str, str]
) -> tuple[int, int]:
    """(max_running, step_tokens), the second never below the first."""
    chunk = args.chunked_prefill_size
    if chunk == -1:
        step = max(args.max_prefill_tokens, context)
        why["scheduler.step_tokens"] = "whole prompts: the larger of --max-prefill-tokens and the context"
    elif chunk is not None:
        step = min(chunk, args.max_prefill_tokens)
    else:
        size = hardware.gpus[0].total_bytes / 2**30 if device == "cuda" else 0.0
        chunk = 512
        if device == "cuda":
            chunk = 2048 if size < 20 else 4096 if size < 60 else 8192 if size < 160 else 16384
        step = min(chunk, args.max_prefill_tokens)
        where = f"a GPU of {size:.0f} GiB" if device == "cuda" else "larger steps gain little on a CPU"
        why["scheduler.step_tokens"] = where if step == chunk else "--max-prefill-tokens"
    running = args.max_running_requests
    if running is None:
        usual = 64 if device == "cpu" else 256
        running = min(usual, step)
        reason = f"usual on a {'CPU' if device == 'cpu' else 'GPU'}"
        why["scheduler.max_running"] = reason if running == usual else "a step must have a token for each"
    if running > step:
        if args.chunked_prefill_size is not None or step == args.max_prefill_tokens:
            raise conflict(
                f"a step of {step} tokens has no token for each of --max-running-requests {running}: raise "
                f"--chunked-prefill-size (and --max-prefill-tokens) to at least {running}, or run fewer",
                "--max-running-requests",
            )
        step = running
        why["scheduler.step_tokens"] = "a token for each running request"
    return running, step


def _mix(args: Args, why: dict[str, str]) -> Mix:
    if args.mix is None:
        if not args.enable_mixed_chunk:
            why["scheduler.mix"] = "long prompts then do not stall requests that generate"
        return "always"
    if args.mix == "never" and args.enable_mixed_chunk:
        raise conflict("--mix never contradicts --enable-mixed-chunk", "--mix")
    return "never" if args.mix == "never" else "always"


def _depth(args: Args, device: Device, why: dict[str, str]) -> int:
    if args.disable_overlap_schedule:
        if args.overlap_depth:
            raise conflict("--disable-overlap-schedule contradicts --overlap-depth", "--overlap-depth")
        return 0
    if args.overlap_depth is not None:
        return args.overlap_depth
    if device == "cuda":
        why["scheduler.depth"] = "the GPU computes while the CPU prepares the next step"
        return 1
    why["scheduler.depth"] = "a CPU computes in the same thread: nothing to overlap"
    return 0


def _all_reasons(args: Args, why: dict[str, str]) -> dict[str, str]:
    """A reason for every field (derived, given or default) and for each accepted flag of the reference."""
    defaults = {f.name: f.default for f in fields(Args)}
    reasons = {"model.load_format": ALWAYS_SO["--load-format"][1]}
    for attribute, meta in flags_of(Args).items():
        given = getattr(args, attribute) != defaults[attribute]
        for field in meta.sets:
            if given or field not in reasons:
                reasons[field] = spelling(attribute) if given else "default"
    for word in args.accepted:
        name = word.split()[0]
        reasons[name] = ALWAYS_SO[SAME_FLAG.get(name, name)][1]
    return reasons | why
