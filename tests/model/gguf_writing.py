"""Writes tiny GGUF files the way llama.cpp's converter does: a transformers Llama, and two kinds of vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ("hello", "world", "the", "capital", "of", "France", "is", "Paris")
NORMAL, UNKNOWN, CONTROL, BYTE = (
    int(kind) for kind in (gguf.TokenType.NORMAL, gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE)
)
_NAMES = {
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


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    """A random float32 Llama whose vocabulary is that of ``add_sentencepiece_vocabulary``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(_pieces()[0])}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **options}))
    for parameter in model.parameters():  # biases and norms too, so that a lost one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    quantize: gguf.GGMLQuantizationType | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    add_vocabulary: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write ``model`` with its q and k rows permuted; ``extra`` may add metadata and tensors."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    (add_vocabulary or add_sentencepiece_vocabulary)(writer)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add_weight(writer, name, weight, config, quantize)
    extra(writer)
    finish(writer)
    return path


def _add_weight(writer: Any, name: str, weight: torch.Tensor, config: LlamaConfig, quantize: Any) -> None:
    module, kind = name.rsplit(".", 1)
    layer = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        layer = f"blk.{number}."
    if module in ("self_attn.q_proj", "self_attn.k_proj"):
        num_heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
        halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
        weight = halves.transpose(1, 2).reshape(weight.shape)
    data = weight.contiguous().numpy()
    target = f"{layer}{_NAMES[module]}.{kind}"
    if quantize is not None and data.ndim > 1:
        writer.add_tensor(target, gguf.quantize(data, quantize), raw_dtype=quantize)
    else:
        writer.add_tensor(target, data)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pieces() -> tuple[list[str], list[float], list[int]]:
    """A small SentencePiece BPE: bytes, letters, and every prefix of a few words, shorter ones with better scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    scores = [0.0] * len(tokens)
    prefixes = {f"▁{word}"[:length] for word in WORDS for length in range(2, len(word) + 2)}
    letters = sorted({*"▁éé中", *"".join(WORDS)})
    for token in (*sorted(prefixes, key=lambda token: (len(token), token)), *letters):
        scores.append(-float(len(tokens)))
        tokens.append(token)
        kinds.append(NORMAL)
    return tokens, scores, kinds


def add_sentencepiece_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens, scores, kinds = _pieces()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
