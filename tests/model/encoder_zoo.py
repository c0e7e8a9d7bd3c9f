"""Tiny checkpoints of every family with an encoder, and transformers on them: shapes that nothing divides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSeq2SeqLM

from shardray.runtime.model.spec import Pooling
from tests.model.zoo import save_drawn
from tests.tiny_models import one_thread

BERT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 84,
    "max_position_embeddings": 130,
}
_BART: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 60,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 84,
    "decoder_ffn_dim": 52,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 60,
    "d_kv": 14,
    "d_ff": 84,
    "num_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
_MARIAN = {"decoder_vocab_size": 97, "pad_token_id": 96, "decoder_start_token_id": 96, "scale_embedding": True}

# name -> (model_type, config); those that give embeddings, and those that generate
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", BERT),
    "bert, 6 heads": ("bert", BERT | {"num_attention_heads": 6, "hidden_act": "relu"}),
    "distilbert": (
        "distilbert",
        {"vocab_size": 97, "dim": 60, "n_layers": 3, "n_heads": 5, "hidden_dim": 84, "max_position_embeddings": 128},
    ),
    "modernbert": (
        "modernbert",
        BERT
        | {
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "cls_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
        },
    ),
    "roberta": ("roberta", BERT),
}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", _BART),
    "bart, scaled": ("bart", _BART | {"scale_embedding": True, "activation_function": "relu"}),
    "m2m100": ("m2m_100", _BART),
    "marian": ("marian", _BART | _MARIAN),
    "mbart": ("mbart", _BART),
    "mt5": ("mt5", _T5),
    "t5": ("t5", _T5),
    "t5, gated": ("t5", _T5 | {"feed_forward_proj": "gated-gelu", "num_heads": 6}),
    "t5, not scaled": ("t5", _T5 | {"tie_word_embeddings": False, "num_decoder_layers": 2}),
}


def save_encoder(name: str, folder: Path) -> Path:
    return save_config(*(ENCODERS | PAIRS)[name], folder)


def save_config(model_type: str, fields: dict[str, Any], folder: Path) -> Path:
    config = CONFIG_MAPPING[model_type](**fields)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModel
    return save_drawn(kind.from_config(config), folder)


@dataclass
class EncoderReference:
    """transformers in float32 on a checkpoint that gives embeddings."""

    folder: Path

    def __post_init__(self) -> None:
        self.model = AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()

    @one_thread()
    @torch.inference_mode()
    def embedding(self, prompt_ids: tuple[int, ...], pooling: Pooling) -> torch.Tensor:
        hidden = self.model(torch.tensor([prompt_ids])).last_hidden_state[0]
        pooled = {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling.mode]
        return pooled / pooled.norm() if pooling.normalize else pooled


@dataclass
class PairReference:
    """transformers in float32 on a checkpoint of encoder and decoder."""

    folder: Path

    def __post_init__(self) -> None:
        self.model = AutoModelForSeq2SeqLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @one_thread()
    @torch.inference_mode()
    def greedy(self, prompt_ids: tuple[int, ...], max_tokens: int, forced_ids: tuple[int, ...] = ()) -> list[int]:
        """The ids that follow the decoder's first one and those that are forced, whatever they are."""
        ids = torch.tensor([prompt_ids])
        first = [self.model.generation_config.decoder_start_token_id, *forced_ids]
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([first]), do_sample=False,
            num_beams=1, max_new_tokens=max_tokens, eos_token_id=None, forced_bos_token_id=None,
        )  # fmt: skip
        return out[0, len(first) :].tolist()

    @one_thread()
    @torch.inference_mode()
    def logits(self, prompt_ids: list[int], decoder_ids: list[int]) -> torch.Tensor:
        """(num_decoder_ids, vocab_size) float32"""
        out = self.model(input_ids=torch.tensor([prompt_ids]), decoder_input_ids=torch.tensor([decoder_ids]))
        return out.logits[0].float()
