"""Logits of tiny random checkpoints against transformers, and configs that are refused with the field's name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.spec import ModelConfigError
from tests.model.logits import LogitsOf
from tests.tiny_models import Reference, save_gpt2, save_llama

ROPE = {"rope_theta": 10_000.0, "original_max_position_embeddings": 32}
LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads as heads": {"num_key_value_heads": 9},
    "head size implied": {"head_dim": None},
    "heads wider than the model": {"head_dim": 32},
    "prime vocabulary": {"vocab_size": 509},
    "gelu": {"hidden_act": "gelu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0} | ROPE},
    "llama3": {
        "rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | ROPE
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0} | ROPE},
    "wide epsilon": {"rms_norm_eps": 1e-2},
}
GPT2S: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "prime vocabulary": {"vocab_size": 509},
    "narrow mlp": {"n_inner": 56},
    "exact gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "unscaled attention": {"scale_attn_weights": False},
    "wide epsilon": {"layer_norm_epsilon": 1e-2},
}


def random_ids(count: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(250) for _ in range(count)]


def collect(folder: Path, dtype: str, sequences: list[list[int]]) -> list[Tensor]:
    """Both sequences' logits: prefilled in uneven chunks beside each other's decodes."""
    found: list[list[Tensor]] = [[], []]
    feeds = [[19, 14, 1, 1, 1], [1, 1, 22, 16, 1]]
    with LogitsOf(folder, dtype) as model:
        starts = [0, 0]
        for counts in zip(*feeds, strict=True):
            rows = {slot: sequences[slot][starts[slot] : starts[slot] + count] for slot, count in enumerate(counts)}
            for slot, part in model.step(rows).items():
                found[slot].append(part)
                starts[slot] += len(rows[slot])
    return [torch.cat(parts) for parts in found]


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_logits(folder: Path, dtype: str = "float32", tolerance: float = 2e-4) -> None:
    reference = Reference(folder)
    sequences = [random_ids(36, 1), random_ids(41, 2)]
    for ids, found in zip(sequences, collect(folder, dtype, sequences), strict=True):
        expected = reference.logits(ids)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert distance(found, expected) < tolerance


@pytest.mark.parametrize("variant", LLAMAS)
def test_a_llama_gives_the_logits_of_transformers(variant: str, tmp_path: Path) -> None:
    check_logits(save_llama(tmp_path, num_hidden_layers=3, **LLAMAS[variant]))


@pytest.mark.parametrize("variant", GPT2S)
def test_a_gpt2_gives_the_logits_of_transformers(variant: str, tmp_path: Path) -> None:
    check_logits(save_gpt2(tmp_path, n_layer=3, **GPT2S[variant]))


def test_a_gpt2_without_the_usual_prefix_is_the_same_model(tmp_path: Path) -> None:
    folder = save_gpt2(tmp_path, n_layer=2)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )
    check_logits(folder)


@pytest.mark.parametrize("save", [save_llama, save_gpt2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_stays_close_to_float32(save: Any, dtype: str, tolerance: float, tmp_path: Path) -> None:
    check_logits(save(tmp_path, initializer_range=0.05), dtype, tolerance)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
GPT2_CONFIG = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize("config", [LLAMA_CONFIG, GPT2_CONFIG], ids=["llama", "gpt2"])
def test_a_config_of_only_the_needed_fields_is_enough(config: dict[str, Any], tmp_path: Path) -> None:
    _, spec = read_model_config(write_config(tmp_path, config))
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.max_positions) == (32, 24, 2, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "lama"},
            "model_type 'lama' is not supported; the nearest is 'llama' (supported: bart, bert, bloom, ",
        ),
        ({"model_type": "gpt_2"}, "model_type 'gpt_2' is not supported; the nearest is 'gpt2'"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"hidden_act": "silo"}, "hidden_act 'silo' is not supported; the nearest is 'silu'"),
        ({"hidden_act": 3}, "hidden_act 3 is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp 2 is not supported (only 1 is)"),
        ({"hidden_size": None}, "hidden_size is None, expected int"),
        ({"hidden_size": "24"}, "hidden_size is '24', expected int"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive int"),
        ({"vocab_size": 32.5}, "vocab_size is 32.5, expected int"),
        ({"vocab_size": True}, "vocab_size is True, expected int"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"num_key_value_heads": 12}, "num_attention_heads 6 is not a multiple of num_key_value_heads 12"),
        ({"num_attention_heads": 9}, "hidden_size 24 is not a multiple of num_attention_heads 9"),
        ({"head_dim": -8}, "head_dim is -8, expected a positive int"),
        ({"head_dim": 7}, "an even number of elements of each head, not 7"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', expected float"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', expected bool"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected bool"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type 'spiral' is not supported"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "short_factor of the rotary scaling has to be a",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config: 'gptq' is not supported; take",
        ),
    ],
)
def test_a_llama_config_that_cannot_be_computed_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read_model_config(write_config(tmp_path, LLAMA_CONFIG | changes))
    assert message in str(caught.value)


def test_a_scaling_that_follows_the_context_allows_more_than_the_trained_window(tmp_path: Path) -> None:
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}}
    _, spec = read_model_config(write_config(tmp_path, LLAMA_CONFIG | scaling))
    assert spec.max_positions == 160


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation_function": "gelu_slow"},
            "activation_function 'gelu_slow' is not supported; the nearest is 'gelu",
        ),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ({"n_head": 5}, "n_embd 24 is not a multiple of n_head 5"),
        ({"n_inner": 0}, "n_inner is 0, expected a positive int"),
    ],
)
def test_a_gpt2_config_that_cannot_be_computed_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read_model_config(write_config(tmp_path, GPT2_CONFIG | changes))
    assert message in str(caught.value)


WINDOWED = {"query_pre_attn_scalar": 256, "sliding_window": 16}


@pytest.mark.parametrize(
    ("model_type", "whole", "fractional"),
    [
        ("cohere", {"logit_scale": 1, "rope_theta": 10_000}, {"logit_scale": 1.0, "rope_theta": 10_000.0}),
        ("olmo", {"clip_qkv": 6}, {"clip_qkv": 6.0}),
        ("granite", {"logits_scaling": 8, "attention_multiplier": 1}, {"logits_scaling": 8.0, "vocab_size": 32.0}),
        (
            "gemma2",
            WINDOWED | {"attn_logit_softcapping": 50},
            {"query_pre_attn_scalar": 256.0, "attn_logit_softcapping": 50.0, "sliding_window": 16.0},
        ),
        (
            "gemma3_text",
            WINDOWED | {"rope_theta": 1_000_000, "rope_local_base_freq": 10_000},  # as those published have it
            WINDOWED | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ],
)  # fmt: skip
def test_a_whole_number_may_be_written_either_way(
    model_type: str, whole: dict[str, Any], fractional: dict[str, Any], tmp_path: Path
) -> None:
    specs = [
        read_model_config(write_config(tmp_path, LLAMA_CONFIG | {"model_type": model_type} | fields))[1]
        for fields in (whole, fractional)
    ]
    assert specs[0] == specs[1]


@pytest.mark.parametrize(
    ("pattern", "is_windowed"),
    [
        ("LLG", [True, True, False, True, False]),  # the last layer sees everything
        (3, [True, True, False, True, True]),
        (None, [True, True, True, False, True]),
    ],
)
def test_exaone4_has_windows_by_its_pattern(pattern: str | int | None, is_windowed: list[bool], tmp_path: Path) -> None:
    fields = {"model_type": "exaone4", "num_hidden_layers": 5, "sliding_window": 16, "sliding_window_pattern": pattern}
    _, spec = read_model_config(write_config(tmp_path, LLAMA_CONFIG | fields))
    assert [layer.attention.window == 16 for layer in spec.layers] == is_windowed
    assert [layer.attention.rotary is not None for layer in spec.layers] == is_windowed


def test_the_kinds_of_layers_count_more_than_a_pattern_and_a_pattern_of_other_letters_is_refused(
    tmp_path: Path,
) -> None:
    fields = {"model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": "LLLG"}
    kinds = {"layer_types": ["full_attention", "sliding_attention"]}
    _, spec = read_model_config(write_config(tmp_path, LLAMA_CONFIG | fields | kinds))
    assert [layer.attention.window for layer in spec.layers] == [None, 16]
    with pytest.raises(ModelConfigError, match="sliding_window_pattern is 'LXG', expected a number, or L's and G's"):
        read_model_config(write_config(tmp_path, LLAMA_CONFIG | fields | {"sliding_window_pattern": "LXG"}))


GPT_NEO_CONFIG = {
    "model_type": "gpt_neo",
    "vocab_size": 32,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "window_size": 16,
    "max_position_embeddings": 64,
}
MODERNBERT_CONFIG = LLAMA_CONFIG | {"model_type": "modernbert", "local_attention": 16}
SMOLLM3_CONFIG = LLAMA_CONFIG | {"model_type": "smollm3"}
MISTAKEN = "expected a list of one for each layer"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA_CONFIG | {"model_type": "cohere2", "sliding_window": 16, "layer_types": ["chunked_attention"] * 2},
         "layer_types: 'chunked_attention' is not supported (one of 'full_attention', 'sliding_attention' is)"),
        (LLAMA_CONFIG | {"model_type": "cohere2", "sliding_window": 16, "layer_types": ["full_attention"]}, MISTAKEN),
        (MODERNBERT_CONFIG | {"layer_types": ["full", "sliding_attention"]}, "layer_types: 'full' is not supported"),
        (MODERNBERT_CONFIG | {"layer_types": "full_attention"}, MISTAKEN),
        (SMOLLM3_CONFIG | {"no_rope_layers": [1]}, MISTAKEN),
        (SMOLLM3_CONFIG | {"no_rope_layers": [1, 2]}, "no_rope_layers: 2 is not supported"),
        (GPT_NEO_CONFIG | {"attention_layers": ["local"]}, MISTAKEN),
        (GPT_NEO_CONFIG | {"attention_types": [[["global"], 1]]}, MISTAKEN),
        (GPT_NEO_CONFIG | {"attention_layers": ["local", "near"]}, "attention_layers: 'near' is not supported"),
    ],
)  # fmt: skip
def test_kinds_of_layers_that_are_not_known_or_too_few_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelConfigError) as caught:
        read_model_config(write_config(tmp_path, config))
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[1]", "is not a JSON object")])
def test_a_broken_config_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match=f"{tmp_path}/config.json: {message}"):
        read_model_config(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=f"{tmp_path}/config.json: cannot be read"):
        read_model_config(tmp_path)
