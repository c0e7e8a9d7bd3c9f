"""Decode steps that are recorded: the same tokens as without, here with a recorder that runs the same calls again.

A CUDA graph in its place is tested in tests/gpu/.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardray.runtime.engine.recorder import EagerRecorder, find_obstacle
from shardray.runtime.engine.request import EngineRequest, SamplingParams
from tests.engine.test_same_tokens import check_tokens, make_arrivals
from tests.model.zoo import ZOO
from tests.ranks import Arrival, RankPool, Served
from tests.tiny_models import Reference, save_gpt2, save_llama

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.0, "min_tokens": 9, "logit_bias": {2: 50.0}, "ignore_eos": False},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.6, "min_p": 0.1, "presence_penalty": 0.7},
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=[save_llama, save_gpt2], ids=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param(tmp_path_factory.mktemp("tiny")))


def mixed_arrivals(max_tokens: int = 24) -> list[Arrival]:
    """Requests of every kind, some of them twice."""
    chance = random.Random(5)
    return [
        Arrival(
            EngineRequest(
                request_id=f"r{index}",
                prompt_ids=tuple(chance.randrange(3, 250) for _ in range(1 + 11 * index)),
                params=SamplingParams(**{"seed": index, "max_tokens": max_tokens, "ignore_eos": True} | params),
            ),
            after_step=2 * index,
        )
        for index, params in enumerate(PARAMS + PARAMS[:3])
    ]


def serve(pool: RankPool, folder: Path, shape: tuple[int, int], record_steps: bool, **fields: Any) -> Served:
    with pool.mesh(folder, *shape, record_steps=record_steps, **fields) as mesh:
        served = mesh.serve(mixed_arrivals())
        assert pool.call(0, "num_recorded") == (len(served.outputs) > 0 and record_steps and 4)
    return served


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_recorded_steps_give_the_tokens_of_transformers(
    pool: RankPool, tiny: Reference, shape: tuple[int, int]
) -> None:
    arrivals = make_arrivals(250, [1, 2, 15, 16, 17, 40, 130], max_tokens=12)
    check_tokens(pool, tiny, shape, arrivals, record_steps=True, max_num_seqs=6, max_num_batched_tokens=96)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 2)], ids=str)
def test_sampled_penalized_and_barred_rows_are_the_same_recorded(
    pool: RankPool, tiny: Reference, shape: tuple[int, int]
) -> None:
    recorded, plain = (serve(pool, tiny.folder, shape, record, max_num_seqs=6) for record in (True, False))
    assert recorded.outputs == plain.outputs
