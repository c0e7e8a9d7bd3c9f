"""Tiny random checkpoints, made on the spot with transformers, with sizes that divide nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LLAMA = {
    "vocab_size": 251,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
GPT2 = {
    "vocab_size": 257,
    "n_embd": 60,
    "n_layer": 5,
    "n_head": 5,
    "n_positions": 1024,
    "initializer_range": 0.15,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def save_llama(folder: Path, **overrides: Any) -> Path:
    return _save(LlamaForCausalLM, LlamaConfig(**(LLAMA | overrides)), folder)


def save_gpt2(folder: Path, **overrides: Any) -> Path:
    return _save(GPT2LMHeadModel, GPT2Config(**(GPT2 | overrides)), folder)


def _save(kind: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(7)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a bias that is dropped or added twice
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For transformers on a tiny model: a second thread only means waiting for it, and long beside other tests."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@dataclass
class Reference:
    """transformers in float32 on one checkpoint."""

    folder: Path

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @one_thread()
    @torch.inference_mode()
    def greedy(self, prompt_ids: tuple[int, ...], max_tokens: int) -> list[int]:
        """The ids that follow the prompt, whatever they are (no end of sequence)."""
        ids = torch.tensor([prompt_ids])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt_ids) :].tolist()

    @one_thread()
    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """(num_tokens, vocab_size) float32"""
        return self.model(torch.tensor([token_ids])).logits[0].float()
