"""Tiny checkpoints of every family, made with the classes of ``transformers``: shapes that nothing divides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

_LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {"vocab_size": 97, "n_embd": 60, "n_layer": 3, "n_head": 5, "n_inner": 84, "n_positions": 128}
_BLOOM: dict[str, Any] = {"vocab_size": 97, "hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 5}
_DEEPSEEK: dict[str, Any] = _LLAMA | {
    "num_key_value_heads": 9,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 36,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_WINDOW = {"sliding_window": 11}

# name -> (model_type, config): what differs from the base is what the family, or its variant, brings
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"vocab_size": 97, "hidden_size": 60, "n_layer": 3, "n_head": 5}),
    "bloom, 6 heads": ("bloom", {"vocab_size": 97, "hidden_size": 60, "n_layer": 3, "n_head": 6}),
    "codegen": ("codegen", _GPT | {"n_embd": 48, "n_head": 4, "rotary_dim": 4}),
    "cohere": ("cohere", _LLAMA),
    "cohere, norms": ("cohere", _LLAMA | {"use_qk_norm": True, "logit_scale": 0.25}),
    "cohere2": ("cohere2", _LLAMA | _WINDOW | {"num_hidden_layers": 5}),
    "deepseek-v2": ("deepseek_v2", _DEEPSEEK | {"q_lora_rank": None}),
    "deepseek-v2, groups": (
        "deepseek_v2",
        _DEEPSEEK
        | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _DEEPSEEK
        | {
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "rope_theta": 10_000.0,
            },
        },
    ),
    "exaone4": ("exaone4", _LLAMA | _WINDOW | {"num_hidden_layers": 5, "sliding_window_pattern": 4}),
    "exaone4, no windows": ("exaone4", _LLAMA | {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "falcon": ("falcon", _BLOOM | {"ffn_hidden_size": 84}),
    "falcon, alibi": (
        "falcon",
        _BLOOM | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "ffn_hidden_size": 84},
    ),
    "falcon, new": (
        "falcon",
        _BLOOM | {"num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 84},
    ),
    "falcon, new, one norm": (
        "falcon",
        _BLOOM
        | {"num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "gemma": ("gemma", _LLAMA | {"head_dim": 12}),
    "gemma2": ("gemma2", _LLAMA | _WINDOW | {"head_dim": 12, "query_pre_attn_scalar": 10}),
    "gemma3": ("gemma3_text", _LLAMA | _WINDOW | {"head_dim": 12, "num_hidden_layers": 7}),
    "gpt-bigcode": ("gpt_bigcode", _GPT),
    "gpt-bigcode, all heads": ("gpt_bigcode", _GPT | {"multi_query": False}),
    "gpt-j": ("gptj", _GPT | {"rotary_dim": 4}),
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": 97,
            "hidden_size": 60,
            "num_layers": 4,
            "attention_types": [[["global", "local"], 2]],
            "num_heads": 5,
            "window_size": 11,
            "max_position_embeddings": 128,
            "intermediate_size": 84,
        },
    ),
    "gpt-neox": ("gpt_neox", _LLAMA | {"rotary_pct": 0.5}),
    "gpt-neox, one after the other": ("gpt_neox", _LLAMA | {"use_parallel_residual": False}),
    "gpt-oss": (
        "gpt_oss",
        _LLAMA | _WINDOW | {"head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "layer_types": None},
    ),
    "gpt2": ("gpt2", _GPT),
    "granite": (
        "granite",
        _LLAMA
        | {"embedding_multiplier": 3.0, "logits_scaling": 2, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "llama": ("llama", _LLAMA),
    "mixtral": ("mixtral", _LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mistral": ("mistral", _LLAMA | _WINDOW),
    "mpt": ("mpt", {"vocab_size": 97, "d_model": 60, "n_heads": 5, "n_layers": 3, "max_seq_len": 128}),
    "nemotron": ("nemotron", _LLAMA | {"head_dim": 12}),
    "olmo": ("olmo", _LLAMA | {"clip_qkv": 0.05}),
    "olmo2": ("olmo2", _LLAMA),
    "olmoe": ("olmoe", _LLAMA | {"num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 0.5}),
    "opt": (
        "opt",
        {
            "vocab_size": 97,
            "hidden_size": 60,
            "ffn_dim": 84,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 60,
        },
    ),
    "phi": ("phi", _LLAMA),
    "phi, norms": ("phi", _LLAMA | {"qk_layernorm": True}),
    "phi3": ("phi3", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2, windows": ("qwen2", _LLAMA | _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2-moe": (
        "qwen2_moe",
        _LLAMA
        | {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 36,
            "shared_expert_intermediate_size": 44,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        _LLAMA
        | {
            "head_dim": 12,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 36,
            "norm_topk_prob": True,
        },
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 12}),
    "smollm3": ("smollm3", _LLAMA | {"num_hidden_layers": 5}),
    "stablelm": ("stablelm", _LLAMA),
    "stablelm, norms": ("stablelm", _LLAMA | {"qk_layernorm": True, "use_qkv_bias": True}),
    "stablelm, parallel": ("stablelm", _LLAMA | {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", _LLAMA | _WINDOW),
}
ZOO["opt, 350m"] = ("opt", ZOO["opt"][1] | {"do_layer_norm_before": False, "word_embed_proj_dim": 36})

WITH_EXPERTS = ("deepseek-v3", "gpt-oss", "mixtral", "olmoe", "qwen2-moe", "qwen3-moe")


def save(name: str, folder: Path) -> Path:
    """Write the checkpoint; weights are drawn so that every parameter matters."""
    model_type, fields = ZOO[name]
    return save_drawn(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields)), folder)


def save_drawn(model: PreTrainedModel, folder: Path) -> Path:
    """The checkpoint of a model with weights drawn anew."""
    torch.manual_seed(7)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "norm" in parameter_name:  # a constant by default
            torch.nn.init.normal_(parameter, mean=float(parameter_name.endswith("weight")), std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("correction_bias", "logits_bias")):
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    return folder
