"""Requests that find their beginning computed give the tokens of those that compute it, whatever the cut."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardray import LLM
from shardray.runtime.engine.request import EngineRequest, SamplingParams
from shardray.runtime.model.sources import resolve_model
from tests.model.zoo import save
from tests.ranks import Arrival, RankPool
from tests.tiny_models import Reference, save_gpt2, save_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)]


@dataclass(frozen=True)
class Talk:
    """Prompts that begin alike, and one that goes on where the first of them ends."""

    prompts: list[tuple[int, ...]]

    @classmethod
    def of(cls, reference: Reference, vocab_size: int = 97) -> Talk:
        chance = random.Random(1)

        def ids(count: int) -> tuple[int, ...]:
            return tuple(chance.randrange(3, vocab_size) for _ in range(count))

        stem = ids(70)
        prompts = [stem + ids(9), stem + ids(40), stem[:48], stem[:33] + ids(3), stem]
        return cls([*prompts, (*prompts[0], *reference.greedy(prompts[0], 10), *ids(5))])

    def arrivals(self) -> list[Arrival]:
        """Some together, so that one plan computes and shares; others while those run, and after."""
        after_steps = [0, 0, 0, 4, 9, 14]
        return [
            Arrival(EngineRequest(request_id=str(i), prompt_ids=prompt, params=GREEDY), after_step)
            for i, (prompt, after_step) in enumerate(zip(self.prompts, after_steps, strict=True))
        ]


def check(pool: RankPool, reference: Reference, shape: tuple[int, int], **fields: Any) -> None:
    talk = Talk.of(reference)
    with pool.mesh(reference.folder, *shape, max_num_seqs=6, **fields) as mesh:
        served = mesh.serve(talk.arrivals())
    for number, prompt in enumerate(talk.prompts):
        assert served.token_ids(str(number)) == reference.greedy(prompt, 10), number
    assert served.stats.num_prefix_hits >= 64 + 32 + 32 + 64 + 80
    found = [served.outputs[str(number)][0].num_cached_prompt_tokens for number in range(6)]
    assert sum(found) == served.stats.num_prefix_hits
    assert (found[0], found[5]) == (0, 80)  # 79 of the prompt and 9 generated tokens were computed before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_found_prefix_changes_no_token_on_any_shape(pool: RankPool, tmp_path: Path, shape: tuple[int, int]) -> None:
    check(pool, Reference(save_llama(tmp_path)), shape, max_num_batched_tokens=128)


@pytest.mark.parametrize("record_steps", [True, False])
def test_a_found_prefix_changes_no_token_of_recorded_steps(pool: RankPool, tmp_path: Path, record_steps: bool) -> None:
    check(pool, Reference(save_gpt2(tmp_path)), (2, 1), record_steps=record_steps, block_size=16)


@pytest.mark.parametrize("family", ["bloom", "gemma2", "mixtral"])  # ALiBi, windows, experts
def test_a_found_prefix_changes_no_token_of_other_families(pool: RankPool, tmp_path: Path, family: str) -> None:
    check(pool, Reference(save(family, tmp_path)), (2, 1), max_model_len=None)


def test_in_bfloat16_the_same_prompt_gives_the_same_tokens_when_it_is_found() -> None:
    prompt = "The three laws of thermodynamics, told to a child who likes trains, are these: " * 4
    with LLM(resolve_model("smollm2-135m"), dtype="bfloat16", max_model_len=512, num_threads=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        first, second = (llm.generate(prompt, params)[0] for _ in range(2))
        assert llm.stats().num_prefix_hits == 64
    assert first.token_ids == second.token_ids
