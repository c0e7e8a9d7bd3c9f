"""Turns a GGUF file of a llama-type model into a model folder: config, safetensors, tokenizer, chat template.

llama.cpp stores the rows of the query and key projections in the order of its interleaved rotary layout; they are put
back into the half-split order that ``config.json`` models use.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from shardray.runtime.model.gguf_config import generation_config, llama_config
from shardray.runtime.model.gguf_file import GgufFile
from shardray.runtime.model.gguf_tokenizer import write_tokenizer
from shardray.runtime.model.model_cache import ModelSourceError, Progress, silent
from shardray.runtime.model.writing import save_in_shards, write_json

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DERIVED_TENSORS = {"rope_freqs.weight"}  # read into config.json as a rope scaling
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def convert_gguf(gguf_path: Path, folder: Path, progress: Progress = silent) -> None:
    """Write the model of ``gguf_path`` into ``folder``. Raises ModelSourceError naming what cannot be converted.

    Weights are stored as float32 or float16 if every matrix of the file is, else (quantized) as bfloat16.
    """
    source = GgufFile(gguf_path)
    config = llama_config(source)
    names = {name: _checkpoint_name(source, name) for name in source.tensors if name not in _DERIVED_TENSORS}
    dtype = _stored_dtype(source)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_tokenizer(source, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(source))
    _write_weights(source, names, config, dtype, folder, progress)


def _checkpoint_name(source: GgufFile, name: str) -> str:
    if name in _TENSOR_NAMES:
        return _TENSOR_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_MODULES:
        raise ModelSourceError(f"{source.path}: tensor {name} is not part of a llama decoder")
    return f"model.layers.{match[1]}.{_LAYER_MODULES[match[2]]}.{match[3]}"


def _stored_dtype(source: GgufFile) -> torch.dtype:
    kinds = {tensor.tensor_type.name for tensor in source.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F32"}): torch.float32, frozenset({"F16"}): torch.float16}.get(frozenset(kinds), torch.bfloat16)


def _write_weights(
    source: GgufFile,
    names: dict[str, str],
    config: dict[str, object],
    dtype: torch.dtype,
    folder: Path,
    progress: Progress,
) -> None:
    num_bytes = {name: int(source.tensors[name].n_elements) * dtype.itemsize for name in names}
    done = 0

    def convert(name: str) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        progress(f"Converting {source.path.name}", done, len(names))
        return {names[name]: _read_weight(source, name, config).to(dtype)}

    save_in_shards(folder, num_bytes, convert)


def _read_weight(source: GgufFile, name: str, config: dict[str, object]) -> torch.Tensor:
    weight = source.read_tensor(name)
    for module, heads_key in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        if f".{module}." in name:
            return _half_split_rows(weight, int(str(config[heads_key])))
    return weight


def _half_split_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Within each head, rows (0, 1), (2, 3), ... of rotary pairs become (0, d/2), (1, d/2 + 1), ..."""
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])  # (num_heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
