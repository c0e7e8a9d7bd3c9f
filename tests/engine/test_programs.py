"""Steps of CPUs as recorded programs: every cut gives the tokens that it gives operation by operation, to the bit.

Logits to the bit, on one rank: tests/model/test_recorded_layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from shardray.parallel.layers import packed_layout
from shardray.runtime.engine.request import EngineRequest, SamplingParams
from tests.engine.test_recorded import mixed_arrivals
from tests.ranks import Arrival, RankPool, Served
from tests.tiny_models import save_llama

pytestmark = pytest.mark.skipif(
    packed_layout("cpu", torch.bfloat16) not in ("pairs", "halves", "narrow"), reason="torch multiplies faster here"
)
FIELDS: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 6, "max_num_batched_tokens": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    return save_llama(tmp_path_factory.mktemp("llama"), **sizes)


def serve(pool: RankPool, folder: Path, shape: tuple[int, int], record_steps: bool | None, **fields: Any) -> Served:
    ranks = range(shape[0] * shape[1])
    with pool.mesh(folder, *shape, record_steps=record_steps, **(FIELDS | fields)) as mesh:
        served = mesh.serve(mixed_arrivals())
        for rank in ranks:
            assert (pool.call(rank, "num_programs") > 3) == (record_steps is None)
    return served


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)], ids=str)
def test_programs_give_what_steps_give_operation_by_operation(
    pool: RankPool, folder: Path, shape: tuple[int, int]
) -> None:
    recorded, plain = (serve(pool, folder, shape, record) for record in (None, False))
    assert recorded.outputs == plain.outputs


def serve_each(pool: RankPool, folder: Path, requests: Sequence[EngineRequest], **fields: Any) -> list[list[Any]]:
    """The tokens of each with what is known of their probabilities."""
    with pool.mesh(folder, 1, 1, **(FIELDS | fields)) as mesh:
        outputs = mesh.serve([Arrival(request) for request in requests]).outputs
    return [
        [(output.token_id, output.logprob, output.top_logprobs) for output in outputs[request.request_id]]
        for request in requests
    ]


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple((7 * i * i + i * length) % 240 + 3 for i in range(length))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_how_prompts_are_cut_changes_no_bit(pool: RankPool, folder: Path, prefix_caching: bool) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)
    prompts = [prompt_of(length) for length in (97, 65, 49, 33, 66, 50)]
    prompts += [prompt[:-1] for prompt in prompts]
    requests = [EngineRequest(request_id=f"r{i}", prompt_ids=prompt, params=params) for i, prompt in enumerate(prompts)]
    fields = {"max_num_seqs": 1, "prefix_caching": prefix_caching}
    whole = serve_each(pool, folder, requests, max_num_seqs=1, max_num_batched_tokens=512, prefix_caching=False)
    for budget in (16, 32, 48):  # the last chunk of some is one token
        assert serve_each(pool, folder, requests, max_num_batched_tokens=budget, **fields) == whole


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_went_before_changes_no_bit(pool: RankPool, folder: Path, temperature: float) -> None:
    """A request that goes on elsewhere reads what it has generated as it read its prompt."""
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=150, logprobs=3, ignore_eos=True)
    requests = [
        EngineRequest(request_id=f"r{i}", prompt_ids=prompt_of(length), params=params)
        for i, length in enumerate((1, 9, 30, 90))
    ]
    undisturbed = serve_each(pool, folder, requests)
    for num_generated in (1, 2, 31, 100, 149):
        resumed = [
            msgspec.structs.replace(request, generated_ids=tuple(token for token, *_ in outputs[:num_generated]))
            for request, outputs in zip(requests, undisturbed, strict=True)
        ]
        assert serve_each(pool, folder, resumed) == [outputs[num_generated:] for outputs in undisturbed]


def test_ranks_of_two_machines_record_nothing_and_give_the_same(pool: RankPool, folder: Path) -> None:
    """Sums over a network are not compiled."""
    there = serve(pool, folder, (2, 1), False, nodes=("a", "b"))
    with pool.mesh(folder, 2, 1, nodes=("a", "b"), **FIELDS) as mesh:
        assert mesh.serve(mixed_arrivals()).outputs == there.outputs
        assert [pool.call(rank, "num_programs") for rank in range(2)] == [0, 0]
    assert serve(pool, folder, (2, 1), None).outputs == there.outputs
