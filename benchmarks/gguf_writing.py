"""A model folder of the Llama family as a GGUF file for llama.cpp: the same weights in the same dtype, no tokenizer.

llama.cpp wants the rows of the query and key projections in the order of its interleaved rotary layout, and vectors in
float32; everything else is copied as it is. Prompts are token ids, so the file says that it has no vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

from benchmarks.protocol import INT8

_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TYPES = {
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "float16": gguf.GGMLQuantizationType.F16,
    "float32": gguf.GGMLQuantizationType.F32,
    INT8: gguf.GGMLQuantizationType.Q8_0,
}


def gguf_of(model_dir: Path, dtype: str, folder: Path) -> Path:
    """The GGUF file of ``model_dir`` in ``folder``, written first if it is not there. Raises ValueError."""
    target = folder / f"{model_dir.name}-{content_digest(model_dir)}-{dtype}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        try:
            write_gguf(model_dir, dtype, partial)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def content_digest(model_dir: Path) -> str:
    """Other weights under the same name are another model."""
    digest = hashlib.sha256()
    for path in (model_dir / "config.json", *sorted(model_dir.glob("*.safetensors"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def write_gguf(model_dir: Path, dtype: str, path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama" or config.get("rope_scaling"):
        raise ValueError(f"{model_dir}: llama.cpp gets models of type llama without rope scaling only")
    writer = gguf.GGUFWriter(path, "llama")
    _add_config(writer, config)
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name != "lm_head.weight" or not config.get("tie_word_embeddings"):
                    _add_tensor(writer, name, tensors.get_tensor(name), config, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    rope_theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, config: dict[str, Any], dtype: str) -> None:
    module, kind = name.rsplit(".", 1)
    layer = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        layer = f"blk.{number}."
    if module in ("self_attn.q_proj", "self_attn.k_proj"):
        key = "num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"
        weight = _interleaved_rows(weight, config.get(key) or config["num_attention_heads"])
    target = f"{layer}{_MODULES[module]}.{kind}"
    if weight.ndim == 1:
        writer.add_tensor(target, weight.float().numpy())
    elif dtype == INT8:
        writer.add_tensor(target, gguf.quants.quantize(weight.float().numpy(), _TYPES[dtype]), raw_dtype=_TYPES[dtype])
    elif dtype == "bfloat16":  # unknown to numpy: the bytes as they are
        data = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(target, data, raw_dtype=_TYPES[dtype])
    else:
        writer.add_tensor(target, weight.to(getattr(torch, dtype)).contiguous().numpy(), raw_dtype=_TYPES[dtype])


def _interleaved_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Within each head, rows (0, d/2), (1, d/2 + 1), ... of rotary pairs become (0, 1), (2, 3), ..."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])  # (num_heads, 2, head_dim / 2, ...)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
