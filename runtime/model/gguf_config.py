"""GGUF metadata of a llama-type model as the ``config.json`` and ``generation_config.json`` that the rest reads."""

from __future__ import annotations

import math

import torch

from shardray.runtime.model.gguf_file import GgufFile
from shardray.runtime.model.model_cache import ModelSourceError

# GGUF keeps only the factors that Llama 3.x derives from these; they are recovered by deriving them again.
_LLAMA3_FREQ_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ORIGINAL_CONTEXT = 8192
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def llama_config(source: GgufFile) -> dict[str, object]:
    """The fields of a transformers LlamaConfig. Raises ModelSourceError for what a llama decoder does not have."""
    _check_supported(source)
    hidden_size = source.require("llama.embedding_length", int)
    num_heads = source.require("llama.attention.head_count", int)
    head_dim = source.find("llama.attention.key_length", int) or hidden_size // num_heads
    rotary_dim = source.find("llama.rope.dimension_count", int) or head_dim
    if rotary_dim != head_dim:
        raise ModelSourceError(
            f"{source.path}: rotates {rotary_dim} of a head's {head_dim} dimensions, not all of them"
        )
    rope_theta = source.find("llama.rope.freq_base", float) or 10000.0
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": source.require("llama.feed_forward_length", int),
        "num_hidden_layers": source.require("llama.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": source.find("llama.attention.head_count_kv", int) or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": source.require("llama.context_length", int),
        "rms_norm_eps": _shortest_float32(source.require("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest_float32(rope_theta),
        "rope_scaling": _rope_scaling(source, rope_theta, head_dim),
        "vocab_size": int(source.tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "attention_bias": any(".attn_q.bias" in name for name in source.tensors),
        "mlp_bias": any(".ffn_up.bias" in name for name in source.tensors),
        **_token_ids(source),
    }


def generation_config(source: GgufFile) -> dict[str, object]:
    """Which ids begin, pad and end a text; ``eos_token_id`` is a list when several end one."""
    return _token_ids(source)


def _check_supported(source: GgufFile) -> None:
    architecture = source.require("general.architecture", str)
    if architecture != "llama":
        raise ModelSourceError(
            f"{source.path}: architecture {architecture!r} is not read from GGUF, only 'llama' is; "
            "use the model's safetensors repository"
        )
    if (source.find("split.count", int) or 1) > 1:
        raise ModelSourceError(f"{source.path}: is one part of several; join them with llama-gguf-split --merge")
    if source.find("llama.expert_count", int):
        raise ModelSourceError(f"{source.path}: is a mixture of experts; use the model's safetensors repository")
    if "token_embd.weight" not in source.tensors:
        raise ModelSourceError(f"{source.path}: has no tensor token_embd.weight; it is not a complete model file")


def _token_ids(source: GgufFile) -> dict[str, object]:
    ids: dict[str, object] = {}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        token_id = source.find(f"tokenizer.ggml.{key}", int)
        if token_id is not None:
            ids[name] = token_id
    found = (source.find(f"tokenizer.ggml.{key}", int) for key in _END_KEYS)
    end_ids = list(dict.fromkeys(token_id for token_id in found if token_id is not None))
    if end_ids:
        ids["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else end_ids
    return ids


def _rope_scaling(source: GgufFile, rope_theta: float, head_dim: int) -> dict[str, object] | None:
    if "rope_freqs.weight" in source.tensors:
        return _llama3_scaling(source, rope_theta, head_dim)
    kind = source.find("llama.rope.scaling.type", str) or "none"
    if kind == "none":
        return None
    scaling: dict[str, object] = {"rope_type": kind, "factor": source.require("llama.rope.scaling.factor", float)}
    if kind == "linear":
        return scaling
    if kind == "yarn":
        original_context = source.require("llama.rope.scaling.original_context_length", int)
        return {**scaling, "original_max_position_embeddings": original_context}
    raise ModelSourceError(f"{source.path}: llama.rope.scaling.type is {kind!r}; none, linear and yarn are read")


def _llama3_scaling(source: GgufFile, rope_theta: float, head_dim: int) -> dict[str, object]:
    stored = source.read_tensor("rope_freqs.weight")  # (head_dim / 2,), what each frequency is divided by
    factor = float(stored.max())
    expected = _llama3_divisors(factor, rope_theta, head_dim)
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-4):
        raise ModelSourceError(
            f"{source.path}: rope_freqs.weight is not a Llama 3 scaling of {_LLAMA3_ORIGINAL_CONTEXT} positions; "
            "use the model's safetensors repository"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        **_LLAMA3_FREQ_FACTORS,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def _llama3_divisors(factor: float, rope_theta: float, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * rope_theta**exponents
    low, high = _LLAMA3_FREQ_FACTORS["low_freq_factor"], _LLAMA3_FREQ_FACTORS["high_freq_factor"]
    smooth = ((_LLAMA3_ORIGINAL_CONTEXT / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _shortest_float32(value: float) -> float:
    """9.999999747378752e-06, read from 32 bits, is the 1e-05 that its author wrote."""
    return float(f"{value:.7g}")
