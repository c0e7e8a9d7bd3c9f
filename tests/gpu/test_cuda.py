"""The same engine on CUDA. Skipped where there is no device; docs/testing.md says what has been run where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardray import LLM, SamplingParams
from tests.chaos.tiny import save_tiny
from tests.engine.test_same_tokens import check_tokens, make_arrivals
from tests.ranks import RankPool
from tests.tiny_models import Reference, save_gpt2, save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=[save_llama, save_gpt2], ids=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(min(4, torch.cuda.device_count()))
    yield pool
    pool.close()


def test_one_device_gives_the_tokens_of_transformers(pool: RankPool, tiny: Reference) -> None:
    arrivals = make_arrivals(250, [1, 16, 17, 130, 700], max_tokens=12)
    check_tokens(pool, tiny, (1, 1), arrivals, device="cuda:0", max_num_seqs=4, max_num_batched_tokens=96)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (3, 1), (2, 2)], ids=str)
def test_nccl_groups_give_the_tokens_of_transformers(pool: RankPool, tiny: Reference, shape: tuple[int, int]) -> None:
    if shape[0] * shape[1] > torch.cuda.device_count():
        pytest.skip(f"needs {shape[0] * shape[1]} CUDA devices")
    arrivals = make_arrivals(250, [1, 16, 17, 130], max_tokens=12)
    check_tokens(pool, tiny, shape, arrivals, device="cuda:{rank}", max_num_seqs=4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_sensibly(dtype: str) -> None:
    with LLM("smollm2-135m", dtype=dtype, device="cuda:0", max_model_len=1024) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=24)
        assert "Paris" in llm.generate("The capital of France is", params)[0].text


@pytest.mark.parametrize("max_draft_tokens", [0, 8])
def test_constrained_tokens_are_those_of_a_cpu_beside_others(tmp_path: Path, max_draft_tokens: int) -> None:
    folder = save_tiny(tmp_path)
    constraints = [{"regex": "(abc-[0-9]{2};){4,}"}, {"json_schema": {"type": "array", "minItems": 3}}, {}]
    params = [SamplingParams(temperature=0.0, max_tokens=60, **constraint) for constraint in constraints * 2]
    found = []
    for device in ("cpu", "cuda:0"):
        with LLM(folder, dtype="float32", device=device, max_draft_tokens=max_draft_tokens) as llm:
            found.append([one.token_ids for one in llm.generate([tuple(b"What now? ")] * len(params), params)])
    assert found[0] == found[1]


def test_pages_are_sized_from_what_the_device_has_left(tmp_path: Path) -> None:
    free_bytes, _ = torch.cuda.mem_get_info()
    with LLM(save_llama(tmp_path), device="cuda:0", max_num_seqs=4096, memory_utilization=0.5) as llm:
        held_bytes = free_bytes - torch.cuda.mem_get_info()[0]
        assert llm.stats().num_pages > 0
        assert held_bytes < free_bytes
