"""Decode steps that are recorded: the same tokens as without, here with a recorder that runs the same calls again.

A CUDA graph in its place is tested in tests/gpu/.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from shardray import LLM
from shardray.runtime.engine.recorder import EagerRecorder, find_obstacle
from shardray.runtime.engine.request import EngineRequest, SamplingParams
from tests.engine.test_same_tokens import check_tokens, make_arrivals
from tests.model.zoo import save
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
        assert pool.call(shape[0] * shape[1] - 1, "recorded_sizes") == ([1, 2, 4, 6] if record_steps else [])
        return mesh.serve(mixed_arrivals())


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
    for request_id, expected in plain.outputs.items():
        assert recorded.token_ids(request_id) == plain.token_ids(request_id)
        for ours, theirs in zip(recorded.outputs[request_id], expected, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)  # products of more rows round differently
            assert [token_id for token_id, _ in ours.top_logprobs] == [token_id for token_id, _ in theirs.top_logprobs]


def test_preemption_for_want_of_pages_changes_no_token_of_recorded_steps(pool: RankPool, tiny: Reference) -> None:
    arrivals = make_arrivals(250, [60, 50, 40, 30, 20], max_tokens=60)
    fields = {"max_model_len": 128, "max_num_seqs": 5}
    with pool.mesh(tiny.folder, 1, 1, **fields) as mesh:
        page_bytes = mesh.infos[0].kv_bytes // (mesh.infos[0].num_kv_tokens // 16)
    with pool.mesh(tiny.folder, 1, 1, record_steps=True, kv_memory_bytes=12 * page_bytes, **fields) as mesh:
        served = mesh.serve(arrivals)
    assert served.stats.num_preemptions > 0
    assert served.stats.num_used_pages == 0
    for arrival in arrivals:
        assert served.token_ids(arrival.request.request_id) == tiny.greedy(arrival.request.prompt_ids, 60)


def test_most_steps_run_as_recordings_and_their_rows_read_what_is_theirs(
    tiny: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[int] = []

    class Counting(EagerRecorder):
        def record(self, run: Any) -> Any:
            again = super().record(run)
            return lambda: (replays.append(1), again())[1]

    monkeypatch.setattr("shardray.runtime.engine.recorded.choose_recorder", lambda device: Counting())
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = [tuple(range(3, 20 + i)) for i in range(3)]
    with LLM(tiny.folder, dtype="float32", device="cpu", record_steps=True, max_num_seqs=5) as llm:
        found = [completion.token_ids for completion in llm.generate(prompts, params)]
    assert found == [tiny.greedy(prompt, 20) for prompt in prompts]
    assert len(replays) >= 19


def test_steps_run_operation_by_operation_where_one_of_them_cannot_be_recorded(
    tiny: Reference, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(EagerRecorder):
        num_recorded = 0

        def record(self, run: Any) -> Any:
            self.num_recorded += 1
            if self.num_recorded == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().record(run)

    monkeypatch.setattr("shardray.runtime.engine.recorded.choose_recorder", lambda device: Full())
    with LLM(tiny.folder, dtype="float32", device="cpu", record_steps=True, max_num_seqs=5) as llm:
        found = llm.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))[0]
        assert llm._mesh._shard._runner._recorded is None
    assert list(found.token_ids) == tiny.greedy((5, 6, 7), 8)
    assert "decode steps could not be recorded, and run slower: CUDA out of memory" in caplog.text


def test_experts_are_seen_to_need_the_host_and_run_as_ever(pool: RankPool, tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    arrivals = make_arrivals(90, [5, 20], max_tokens=8)
    with pool.mesh(folder, 2, 1, record_steps=True, max_model_len=64, max_num_seqs=2) as mesh:
        assert pool.call(1, "recorded_sizes") == []
        served = mesh.serve(arrivals)
    with pool.mesh(folder, 1, 1, record_steps=False, max_model_len=64, max_num_seqs=2) as mesh:
        assert mesh.serve(arrivals).outputs == served.outputs


@pytest.mark.parametrize(
    ("run", "obstacle"),
    [
        (lambda x: x.nonzero(), "aten.nonzero.default"),
        (lambda x: x[x > 0], "aten.index.Tensor"),
        (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda x: torch.bincount(x.long()), "aten.bincount.default"),
        (lambda x: x.softmax(-1).argmax(), None),
    ],
)
def test_what_needs_the_host_is_found(run: Any, obstacle: str | None) -> None:
    assert find_obstacle(lambda: run(torch.arange(4.0))) == obstacle
