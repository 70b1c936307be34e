"""What a model is, read from its folder: shapes, windows, rope, special tokens. No weight is touched.

Both generations of `config.json` are understood: `rope_theta`, `rope_scaling` and `torch_dtype` (transformers
4 and earlier), and `rope_parameters` and `dtype` (transformers 5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from trunkline.config.schema import DTYPE_BYTES, KVType
from trunkline.types import RequestError

# The layers built for each architecture; `models/registry.py` maps the same names to code.
ARCHITECTURES: tuple[str, ...] = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
# Fields of generation_config.json that become defaults of requests.
GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What a hub download may fetch: never a pickle.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt")

_ROPE_FACTORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
)
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ACTIVATIONS: Mapping[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_MAX_HIDDEN = 32767  # a longer row would be summed in an order that depends on the number of threads


class ModelError(RequestError):
    """A model folder that can't be served: what is wrong, with the numbers. `code` is stable."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, code=code, param="model_path", status=500)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `kind` is linear, llama3 or yarn, `values` its named numbers."""

    kind: str
    values: tuple[tuple[str, float], ...]

    def get(self, name: str, default: float | None = None) -> float | None:
        return dict(self.values).get(name, default)

    def __getitem__(self, name: str) -> float:
        return dict(self.values)[name]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A dense decoder model. Sizes count elements, `max_position` tokens."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    attention_bias: bool  # on the q, k and v projections
    output_bias: bool  # on the attention output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head
    layer_windows: tuple[int | None, ...]  # per layer: most keys a query sees, itself included; None: all
    max_position: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str  # of the checkpoint
    path: str
    generation_defaults: dict[str, float]
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # of the gate
    attention_scale: float | None = None  # of scores; None: head_dim ** -0.5
    attention_soft_cap: float = 0.0  # scaled scores s become cap * tanh(s / cap); 0: they stay
    pooling: str | None = None  # how sentence-transformers pools it: a `Pooling`, or another in its words

    def kv_bytes_per_token(self, dtype: KVType) -> int:
        """Bytes of keys and values of one token over all layers; a scale takes two."""
        head = self.head_dim + 2 if dtype == "int8" else self.head_dim * DTYPE_BYTES[dtype]
        return 2 * self.num_layers * self.num_kv_heads * head

    @property
    def matrix_count(self) -> int:
        """Parameters of the layers' products, without the output head."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (query + 2 * kv) + query * self.hidden_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def weight_count(self) -> int:
        """Parameters, a tied output head counted once."""
        hidden, inner, dim = self.hidden_size, self.intermediate_size, self.head_dim
        query, kv = self.num_heads * dim, self.num_kv_heads * dim
        layer = 2 * hidden + (query + 2 * kv) * self.attention_bias + hidden * self.output_bias
        layer += (2 * inner + hidden) * self.mlp_bias + 2 * dim * self.qk_norm
        embeddings = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return self.matrix_count + self.num_layers * layer + embeddings + hidden


def load_model_spec(path: str, *, revision: str | None = None) -> ModelSpec:
    """Read `config.json` and `generation_config.json` of a folder in Hugging Face layout.

    A `path` that is no folder but looks like a hub id (`owner/name`) is downloaded first, without any file
    that could hold a pickle. Raises ModelError.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _download(path, revision)
    config = _read_json(folder / "config.json")
    if config is None:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{folder} has no config.json (it holds: {found}): give a folder in Hugging Face layout",
            "no_config",
        )
    return _Reader(folder, config, _read_json(folder / "generation_config.json") or {}).spec()


def _download(name: str, revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no folder {name!r}, and it is no hub id (owner/name) either", "no_model")
    from huggingface_hub import snapshot_download  # 0.3 s, and only for hub ids

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # its own, the HTTP client's and the socket's errors share no base class
        reason = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"there is no folder {name!r}, and it can't be downloaded as a hub id"
            f"{f' at revision {revision!r}' if revision else ''}: {type(error).__name__}: {reason[0]}. "
            "Check the name and the network, or download the model and give its folder",
            "hub_unreachable",
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read as JSON: {error}", "bad_config") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}", "bad_config")
    return value


def _pooling(folder: Path) -> str | None:
    """Of a folder that sentence-transformers wrote: "last", "mean", or other ways by its names."""
    modes = _read_json(folder / "1_Pooling" / "config.json")
    if modes is None:
        return None
    prefix = "pooling_mode_"
    asked = [
        name.removeprefix(prefix) for name, on in modes.items() if name.startswith(prefix) and on is True
    ]
    if "pooling_mode" in modes:
        asked.append(str(modes["pooling_mode"]))
    known = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}
    return " + ".join(known.get(name, name) for name in asked) or "no pooling"


class _Reader:
    """Checks and translates one config.json; every complaint names the file and the key."""

    def __init__(self, folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.generation = generation

    def spec(self) -> ModelSpec:
        architecture = self._architecture()
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        layers = self._size("num_hidden_layers")
        act = self.config.get("hidden_activation") or self.config.get("hidden_act", "silu")
        if act not in _ACTIVATIONS:
            raise self._error(f"hidden_act is {act!r}; known: {', '.join(_ACTIVATIONS)}")
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"]
            method = method.get("quant_method") if isinstance(method, dict) else method
            raise self._error(f"the weights are quantized ({method!r}), which is not supported", "quantized")
        qwen = architecture.startswith("Qwen")
        bias = bool(self.config.get("attention_bias", False))
        theta, scaling = self._rope()
        spec = ModelSpec(
            architecture=architecture,
            hidden_size=hidden,
            intermediate_size=self._size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=self._size("num_key_value_heads", heads),
            head_dim=self._size("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden // heads),
            vocab_size=self._size("vocab_size"),
            rms_norm_eps=self._number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(self.config.get("tie_word_embeddings", False)),
            attention_bias=bias or architecture == "Qwen2ForCausalLM",
            output_bias=bias and architecture != "Qwen2ForCausalLM",
            mlp_bias=bool(self.config.get("mlp_bias", False)) and not qwen,
            qk_norm=architecture == "Qwen3ForCausalLM",
            layer_windows=self._windows(architecture, layers),
            max_position=self._size("max_position_embeddings"),
            eos_token_ids=self._eos(),
            bos_token_id=self._token("bos_token_id"),
            dtype=self._dtype(),
            path=str(self.folder),
            generation_defaults=self._generation_defaults(),
            activation=_ACTIVATIONS[act],
            pooling=_pooling(self.folder),
        )
        self._check_shapes(spec)
        return spec

    def _error(self, problem: str, code: str = "bad_config") -> ModelError:
        return ModelError(f"{self.folder / 'config.json'}: {problem}", code)

    def _architecture(self) -> str:
        names = self.config.get("architectures")
        known = ", ".join(ARCHITECTURES)
        if not isinstance(names, list) or len(names) != 1:
            raise self._error(f"architectures must list one name, not {names!r}. Known: {known}")
        if names[0] not in ARCHITECTURES:
            raise self._error(
                f"the architecture {names[0]!r} is not known. Known: {known}", "unknown_architecture"
            )
        return str(names[0])

    def _size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise self._error(f"{key} is missing")
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(f"{key} must be a positive integer, not {value!r}")
        return value

    def _number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._error(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def _rope(self) -> tuple[float, RopeScaling | None]:
        raw = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(raw, dict):
            raise self._error(f"rope parameters must be an object, not {raw!r}")
        nested = [key for key, value in raw.items() if isinstance(value, dict)]
        if nested:
            raise self._error(f"rope parameters of each layer type ({nested}) are not known", "unknown_rope")
        theta = raw.get("rope_theta", self.config.get("rope_theta", 10000.0))
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < float("inf"):
            raise self._error(f"rope_theta must be a number above 1, not {theta!r}")
        if raw.get("partial_rotary_factor", self.config.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise self._error("partial_rotary_factor other than 1 is not known", "unknown_rope")
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind == "default":
            return float(theta), None
        if not isinstance(kind, str) or kind not in _ROPE_FACTORS:
            why = " (it would change keys that are already computed)" if kind == "dynamic" else ""
            raise self._error(
                f"the rope type {kind!r} is not known{why}. Known: default, {', '.join(_ROPE_FACTORS)}",
                "unknown_rope",
            )
        raw = {"original_max_position_embeddings": self.config.get("max_position_embeddings"), **raw}
        values: list[tuple[str, float]] = []
        for name in (*_ROPE_FACTORS[kind], *(_YARN_OPTIONS if kind == "yarn" else ())):
            value = raw.get(name)
            if value is None and name in _YARN_OPTIONS:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise self._error(f"rope type {kind!r} needs {name} to be a positive number, not {value!r}")
            values.append((name, float(value)))
        values.append(("truncate", float(bool(raw.get("truncate", True)))))
        return float(theta), RopeScaling(kind, tuple(values))

    def _windows(self, architecture: str, layers: int) -> tuple[int | None, ...]:
        if architecture == "LlamaForCausalLM":
            return (None,) * layers
        if architecture == "MistralForCausalLM":
            if self.config.get("sliding_window", 4096) is None:
                return (None,) * layers
            return (self._size("sliding_window", 4096),) * layers
        if not self.config.get("use_sliding_window") or self.config.get("sliding_window", 4096) is None:
            return (None,) * layers
        window = self._size("sliding_window", 4096)
        kinds = self.config.get("layer_types")
        if kinds is None:
            first = self.config.get("max_window_layers", 28)
            if isinstance(first, bool) or not isinstance(first, int):
                raise self._error(f"max_window_layers must be an integer, not {first!r}")
            return tuple(window if layer >= first else None for layer in range(layers))
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise self._error(f"layer_types must list {layers} entries (num_hidden_layers), not {kinds!r}")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise self._error(f"layer_types: {kind!r} is not known")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def _token(self, key: str) -> int | None:
        value = self.config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def _eos(self) -> tuple[int, ...]:
        """Token ids of both files: a chat model often lists its end-of-turn only in the second."""
        found: dict[int, None] = {}
        for source in (self.generation, self.config):
            value = source.get("eos_token_id")
            for token in value if isinstance(value, list) else [value]:
                if token is None:
                    continue
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise self._error(f"eos_token_id must be token ids, not {value!r}")
                found[token] = None
        return tuple(found)

    def _dtype(self) -> str:
        value = self.config.get("dtype", self.config.get("torch_dtype")) or "float32"
        if not isinstance(value, str):
            raise self._error(f"dtype must be a name such as 'bfloat16', not {value!r}")
        return value.removeprefix("torch.")

    def _generation_defaults(self) -> dict[str, float]:
        values = {name: self.generation.get(name) for name in GENERATION_FIELDS}
        for name, value in values.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ModelError(
                    f"{self.folder / 'generation_config.json'}: {name} must be a number, not {value!r}",
                    "bad_config",
                )
        if (
            self.generation.get("do_sample") is False
        ):  # as transformers means it: always the most likely token
            values["temperature"] = 0.0
        return {name: value for name, value in values.items() if value is not None}

    def _check_shapes(self, spec: ModelSpec) -> None:
        if spec.num_heads % spec.num_kv_heads:
            raise self._error(
                f"num_attention_heads {spec.num_heads} is no multiple of "
                f"num_key_value_heads {spec.num_kv_heads}"
            )
        if self.config.get("head_dim") is None and spec.hidden_size % spec.num_heads and not spec.qk_norm:
            raise self._error(
                f"hidden_size {spec.hidden_size} is no multiple of num_attention_heads {spec.num_heads}"
            )
        if spec.head_dim % 2:
            raise self._error(f"head_dim is {spec.head_dim}: rotary embedding needs an even number")
        if spec.hidden_size > _MAX_HIDDEN:
            raise self._error(f"hidden_size is {spec.hidden_size}, at most {_MAX_HIDDEN} is supported")
        for token in spec.eos_token_ids:
            if token >= spec.vocab_size:
                raise self._error(f"eos_token_id {token} is outside the vocabulary of {spec.vocab_size}")
