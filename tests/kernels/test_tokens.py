"""The whole engine on the kernels: the float32 tokens of transformers, with chunked prompts and batches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shardray import LLM, SamplingParams
from shardray.runtime.model.kernels.splits import SPLIT
from tests.kernels.steps import DEVICE
from tests.model.encoder_zoo import PairReference, save_encoder
from tests.model.zoo import save
from tests.tiny_models import Reference, save_llama

MAX_TOKENS = 5
PARAMS = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)


def some_prompts(lens: list[int], vocab_size: int) -> list[tuple[int, ...]]:
    chance = random.Random(0)
    return [tuple(chance.randrange(3, vocab_size) for _ in range(length)) for length in lens]


def check(reference: Reference | PairReference, prompts: list[tuple[int, ...]]) -> None:
    """Three at a time, in chunks of 96 tokens at most."""
    with LLM(
        reference.folder, dtype="float32", device=DEVICE.type, max_num_seqs=3, max_num_batched_tokens=96,
        kv_memory_bytes=8 << 20,
    ) as llm:  # fmt: skip
        found = [completion.token_ids for completion in llm.generate(prompts, PARAMS)]
    assert found == [reference.greedy(prompt, MAX_TOKENS) for prompt in prompts]


def test_a_llama_gives_the_tokens_of_transformers_over_several_splits(tmp_path: Path) -> None:
    reference = Reference(save_llama(tmp_path, num_hidden_layers=2))
    check(reference, some_prompts([1, 17, 40, SPLIT + 30], 250))


FAMILIES = ["gpt2", "gemma2", "gpt-oss", "bloom"]  # layer norms; windows and soft caps; sinks; slopes


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_other_kinds_give_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    check(Reference(save(family, tmp_path)), some_prompts([1, 19, 33], 90))


def test_an_encoder_and_its_decoder_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    check(PairReference(save_encoder("t5", tmp_path)), some_prompts([3, 31], 90))
