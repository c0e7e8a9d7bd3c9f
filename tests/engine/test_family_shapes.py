"""Every family on every small shape: the float32 greedy tokens of transformers, requests of unlike lengths together."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardray import LLM, SamplingParams
from tests.engine.test_same_tokens import make_arrivals
from tests.model.zoo import WITH_EXPERTS, ZOO, save
from tests.ranks import Arrival, RankPool
from tests.tiny_models import Reference

SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)]
QUICK_SHAPES = [(2, 2)]
MAX_TOKENS = 24
PROMPT_LENS = [1, 30, 9, 17, 41]


@pytest.mark.parametrize("shapes", [QUICK_SHAPES, pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["quick", "all"])
@pytest.mark.parametrize("name", ZOO)
def test_a_family_gives_the_tokens_of_transformers(
    pool: RankPool, name: str, shapes: list[tuple[int, int]], tmp_path: Path
) -> None:
    reference = Reference(save(name, tmp_path))
    arrivals = make_arrivals(97, PROMPT_LENS, MAX_TOKENS)
    expected = {
        arrival.request.request_id: reference.greedy(arrival.request.prompt_ids, MAX_TOKENS) for arrival in arrivals
    }
    for shape in shapes:
        assert serve(pool, tmp_path, shape, arrivals) == expected, shape
    assert serve_short_of_pages(pool, tmp_path, arrivals) == expected


def test_how_unevenly_experts_are_loaded_is_told(tmp_path: Path) -> None:
    """Between all alike and everything on the two that each token gets."""
    save("mixtral", tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        llm.generate([arrival.request.prompt_ids for arrival in make_arrivals(97, PROMPT_LENS, MAX_TOKENS)], params)
        assert 1.0 < llm.stats().expert_imbalance <= 5 / 2
    save("llama", tmp_path / "llama")
    with LLM(tmp_path / "llama", device="cpu", dtype="float32") as llm:
        llm.generate([(5, 6, 7)], params)
        assert llm.stats().expert_imbalance == 0.0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_whole_experts_on_ranks_give_the_same_tokens(pool: RankPool, name: str, tmp_path: Path) -> None:
    reference = Reference(save(name, tmp_path))
    arrivals = make_arrivals(97, PROMPT_LENS, MAX_TOKENS)
    for shape in [(2, 1), (4, 1)]:
        found = serve(pool, tmp_path, shape, arrivals, expert_parallel=True)
        for arrival in arrivals:
            request = arrival.request
            assert found[request.request_id] == reference.greedy(request.prompt_ids, MAX_TOKENS)


def serve(
    pool: RankPool, folder: Path, shape: tuple[int, int], arrivals: list[Arrival], **fields: bool
) -> dict[str, list[int]]:
    with pool.mesh(folder, *shape, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, **fields) as mesh:
        served = mesh.serve(arrivals)
    return {request_id: served.token_ids(request_id) for request_id in served.outputs}


def serve_short_of_pages(
    pool: RankPool, folder: Path, arrivals: list[Arrival], max_model_len: int = 128, **more: int
) -> dict[str, list[int]]:
    """On three tensor ranks, with so few pages that requests are preempted."""
    fields = {"max_num_seqs": 5, "max_model_len": max_model_len, **more}
    with pool.mesh(folder, 3, 1, **fields) as mesh:
        page_bytes = max(info.kv_bytes * 16 // info.num_kv_tokens for info in mesh.infos)
    with pool.mesh(folder, 3, 1, kv_memory_bytes=9 * page_bytes, **fields) as mesh:
        served = mesh.serve([Arrival(arrival.request) for arrival in arrivals])
    assert served.stats.num_preemptions > 0
    assert served.stats.num_used_pages == 0
    return {request_id: served.token_ids(request_id) for request_id in served.outputs}
