"""Reading config.json: both generations of keys, each family's defaults, and every complaint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.model.checkpoints import FAMILIES
from tests.model.conftest import Checkpoints
from trunkline.config import model_spec
from trunkline.config.model_spec import ModelError, RopeScaling, load_model_spec
from trunkline.models.registry import LAYERS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def write(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> str:
    config = {k: v for k, v in {**LLAMA, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


def refused(folder: Path, code: str = "bad_config", **changes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model_spec(write(folder, **changes))
    assert caught.value.code == code
    assert str(folder) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_transformers(family: str, checkpoints: Checkpoints) -> None:
    folder, model = checkpoints(family)
    spec, config = load_model_spec(str(folder)), AutoConfig.from_pretrained(folder)
    assert spec.weight_count == sum(p.numel() for p in model.parameters())
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.dtype == "float32"
    assert spec.max_position == 2048 and spec.eos_token_ids == (2,)
    assert spec.kv_bytes_per_token("bfloat16") == 3 * 2 * spec.num_kv_heads * spec.head_dim * 2


def test_old_keys(tmp_path: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    spec = load_model_spec(write(tmp_path, rope_theta=500000.0, rope_scaling=scaling))
    assert spec.rope_theta == 500000.0 and spec.dtype == "bfloat16"
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.kind == "llama3" and spec.rope_scaling["factor"] == 8.0
    assert (spec.head_dim, spec.bos_token_id) == (16, 1)


def test_new_keys(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2}
    spec = load_model_spec(write(tmp_path, rope_parameters=rope, dtype="float16", torch_dtype=...))
    assert spec.rope_theta == 1e6 and spec.dtype == "float16"
    assert spec.rope_scaling == RopeScaling("linear", (("factor", 2.0), ("truncate", 1.0)))


def test_heads_default_to_one_kv_head_each(tmp_path: Path) -> None:
    assert load_model_spec(write(tmp_path, num_key_value_heads=...)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, (32, 32)),
        ({"architectures": ["MistralForCausalLM"]}, (4096, 4096)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None, None)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}, (None, None)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (None, 32),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (32, None),
        ),
        ({"sliding_window": 32}, (None, None)),  # Llama has none
    ],
)
def test_windows(tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert load_model_spec(write(tmp_path, **changes)).layer_windows == windows


def test_generation_config(tmp_path: Path) -> None:
    generation = {"eos_token_id": [5, 2], "temperature": 0.6, "top_k": 20, "do_sample": True}
    spec = load_model_spec(write(tmp_path, generation))
    assert spec.eos_token_ids == (5, 2)
    assert spec.generation_defaults == {"temperature": 0.6, "top_k": 20}
    spec = load_model_spec(write(tmp_path, {**generation, "do_sample": False}))
    assert spec.generation_defaults == {"temperature": 0.0, "top_k": 20}


@pytest.mark.parametrize(
    ("modes", "pooling"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls_token"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean + max_tokens"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode_mean_tokens": False}, "no pooling"),
    ],
)
def test_pooling_of_sentence_transformers(tmp_path: Path, modes: dict[str, Any], pooling: str) -> None:
    path = write(tmp_path)
    assert load_model_spec(path).pooling is None
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert load_model_spec(path).pooling == pooling


def test_missing_folder_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no hub id") as caught:
        load_model_spec(str(tmp_path / "nothing"))
    assert caught.value.code == "no_model"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"it holds: tokenizer\.json"):
        load_model_spec(str(tmp_path))


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return write(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model_spec("some/model", revision="v1").path == str(tmp_path)
    assert asked["name"] == "some/model" and asked["revision"] == "v1"
    patterns = asked["allow_patterns"]
    assert "*.safetensors" in patterns and not any("bin" in p or "pt" in p or p == "*" for p in patterns)


def test_an_unreachable_hub_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise ConnectionError("no route to host\nmore text")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError, match=r"ConnectionError: no route to host\. Check the name") as caught:
        load_model_spec("some/model", revision="v1")
    assert caught.value.code == "hub_unreachable" and "'v1'" in caught.value.message


def test_known_architectures_are_those_that_can_be_built() -> None:
    assert tuple(LAYERS) == model_spec.ARCHITECTURES


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_malformed_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError) as caught:
        load_model_spec(str(tmp_path))
    assert caught.value.code == "bad_config"


def test_unknown_architecture(tmp_path: Path) -> None:
    message = refused(tmp_path, "unknown_architecture", architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel" in message and all(name in message for name in model_spec.ARCHITECTURES)
    assert "must list one name" in refused(tmp_path, architectures=...)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, not '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": -5}, "vocab_size must be a positive integer, not -5"),
        ({"vocab_size": True}, "not True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "hidden_size 66 is no multiple of num_attention_heads 4"),
        ({"head_dim": 17}, "head_dim is 17"),
        ({"hidden_size": 40000}, "hidden_size is 40000"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": 0}, "rope_theta must be a number above 1"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; known: silu, gelu"),
        ({"eos_token_id": [2, 100]}, "eos_token_id 100 is outside the vocabulary of 100"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be token ids"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "needs factor to be a positive number"),
        ({"rope_scaling": 8}, "rope parameters must be an object"),
        ({"torch_dtype": 16}, "dtype must be a name"),
    ],
)
def test_impossible_values(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, **changes)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "made-up", ["linear"]])
def test_unknown_rope(tmp_path: Path, kind: Any) -> None:
    message = refused(tmp_path, "unknown_rope", rope_scaling={"rope_type": kind, "factor": 2.0})
    assert str(kind) in message and "default, linear, llama3, yarn" in message


def test_nested_rope_and_quantized_weights_are_not_guessed_at(tmp_path: Path) -> None:
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert "['full_attention']" in refused(tmp_path, "unknown_rope", rope_parameters=nested)
    assert "'fp8'" in refused(tmp_path, "quantized", quantization_config={"quant_method": "fp8"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"]}, "must list 2 entries"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention' is not known"),
        ({"max_window_layers": "all"}, "max_window_layers must be an integer"),
    ],
)
def test_bad_windows(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
    assert words in refused(tmp_path, **qwen, **changes)


def test_bad_generation_default(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="temperature must be a number"):
        load_model_spec(write(tmp_path, {"temperature": "hot"}))
