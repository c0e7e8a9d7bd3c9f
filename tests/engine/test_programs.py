"""Steps of CPUs as recorded programs: every cut gives the tokens that it gives operation by operation, to the bit.

Logits to the bit, on one rank: tests/model/test_recorded_layers.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_how_prompts_are_cut_changes_no_bit(pool: RankPool, folder: Path, prefix_caching: bool) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)
    prompts = [tuple((7 * i * i + i * length) % 240 + 3 for i in range(length)) for length in (97, 65, 49, 33, 66, 50)]
    prompts += [prompt[:-1] for prompt in prompts]

    def outputs_with(**fields: Any) -> list[list[tuple[Any, ...]]]:
        with pool.mesh(folder, 1, 1, **(FIELDS | {"max_num_seqs": 1} | fields)) as mesh:
            arrivals = [
                Arrival(EngineRequest(request_id=f"r{i}", prompt_ids=prompt, params=params))
                for i, prompt in enumerate(prompts)
            ]
            outputs = mesh.serve(arrivals).outputs.values()
        return [[(output.token_id, output.logprob, output.top_logprobs) for output in found] for found in outputs]

    whole = outputs_with(max_num_batched_tokens=512, prefix_caching=False)
    for budget in (16, 32, 48):
        assert outputs_with(max_num_batched_tokens=budget, prefix_caching=prefix_caching) == whole


def test_ranks_of_two_machines_record_nothing_and_give_the_same(pool: RankPool, folder: Path) -> None:
    """Sums over a network are not compiled."""
    there = serve(pool, folder, (2, 1), False, nodes=("a", "b"))
    with pool.mesh(folder, 2, 1, nodes=("a", "b"), **FIELDS) as mesh:
        assert mesh.serve(mixed_arrivals()).outputs == there.outputs
        assert [pool.call(rank, "num_programs") for rank in range(2)] == [0, 0]
    assert serve(pool, folder, (2, 1), None).outputs == there.outputs
