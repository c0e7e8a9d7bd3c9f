"""A model folder of a given size with random weights: for how long things take, not for what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
    "head_dim": 64,
}


def write_model(folder: Path, sizes: dict[str, Any]) -> Path:
    """A Llama with these fields of its configuration, in one file in bfloat16; nothing is done if it is there."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "config.json").write_text(json.dumps(_COMMON | sizes))
        generator = torch.Generator().manual_seed(0)
        tensors = {name: _weight(shape, generator) for name, shape in _shapes(sizes)}
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        partial.rename(folder)
    return folder


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    row = torch.randn(shape[1], generator=generator).mul_(0.02).bfloat16()
    return row.repeat(shape[0], 1)


def _shapes(sizes: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, mlp, head_dim = sizes["hidden_size"], sizes["intermediate_size"], (_COMMON | sizes)["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head_dim, sizes["num_key_value_heads"] * head_dim
    of_layer: list[tuple[str, tuple[int, ...]]] = [
        ("self_attn.q_proj", (queries, hidden)),
        ("self_attn.k_proj", (keys, hidden)),
        ("self_attn.v_proj", (keys, hidden)),
        ("self_attn.o_proj", (hidden, queries)),
        ("mlp.gate_proj", (mlp, hidden)),
        ("mlp.up_proj", (mlp, hidden)),
        ("mlp.down_proj", (hidden, mlp)),
        ("input_layernorm", (hidden,)),
        ("post_attention_layernorm", (hidden,)),
    ]
    layers = range(sizes["num_hidden_layers"])
    shapes = [(f"model.layers.{layer}.{name}.weight", shape) for layer in layers for name, shape in of_layer]
    ends: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (sizes["vocab_size"], hidden))]
    if not (_COMMON | sizes)["tie_word_embeddings"]:
        ends.append(("lm_head.weight", (sizes["vocab_size"], hidden)))
    return [*ends, *shapes, ("model.norm.weight", (hidden,))]
