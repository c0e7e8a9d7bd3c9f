"""The same float32 tokens as transformers, whatever the cut, the batch, the chunking, or a preemption."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardray.runtime.engine.request import EngineRequest, FinishReason, SamplingParams
from shardray.runtime.model.sources import resolve_model
from tests.ranks import Arrival, RankPool
from tests.tiny_models import Reference, save_gpt2, save_llama

MAX_RANKS = 6
SHAPES = [(tp, pp) for tp in (1, 2, 3, 5) for pp in (1, 2, 3)]
QUICK_SHAPES = [shape for shape in SHAPES if shape[0] * shape[1] <= MAX_RANKS]
SLOW_SHAPES = [pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES if shape not in QUICK_SHAPES]


@pytest.fixture(scope="module")
def large_pool() -> Iterator[RankPool]:
    pool = RankPool(15)
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=["llama", "llama-tied-biased", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        return Reference(save_llama(folder, tie_word_embeddings=False))
    if request.param == "gpt2":
        return Reference(save_gpt2(folder))
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 256, "rope_theta": 10_000.0}
    biases = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    return Reference(save_llama(folder, **biases, rope_parameters=scaling))


@pytest.fixture(scope="module")
def smollm() -> Reference:
    return Reference(resolve_model("smollm2-135m"))


def make_arrivals(vocab_size: int, prompt_lens: list[int], max_tokens: int, seed: int = 0) -> list[Arrival]:
    chance = random.Random(seed)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [
        Arrival(
            EngineRequest(
                request_id=f"r{index}",
                prompt_ids=tuple(chance.randrange(3, vocab_size) for _ in range(prompt_len)),
                params=params,
            ),
            after_step=chance.randrange(0, 12),
        )
        for index, prompt_len in enumerate(prompt_lens)
    ]


def check_tokens(
    pool: RankPool, reference: Reference, shape: tuple[int, int], arrivals: list[Arrival], **fields: object
) -> None:
    with pool.mesh(reference.folder, *shape, **fields) as mesh:
        served = mesh.serve(arrivals)
    for arrival in arrivals:
        request = arrival.request
        expected = reference.greedy(request.prompt_ids, request.params.max_tokens)
        assert served.token_ids(request.request_id) == expected, request.request_id
        assert served.outputs[request.request_id][-1].finish_reason is FinishReason.LENGTH
    assert served.stats.num_used_pages == 0


@pytest.mark.parametrize("shape", QUICK_SHAPES, ids=str)
def test_a_tiny_model_gives_the_tokens_of_transformers_on_any_shape(
    pool: RankPool, tiny: Reference, shape: tuple[int, int]
) -> None:
    arrivals = make_arrivals(250, [1, 2, 15, 16, 17, 40, 130, 700], max_tokens=12)
    check_tokens(pool, tiny, shape, arrivals, max_num_seqs=6, max_num_batched_tokens=96)


@pytest.mark.parametrize("shape", SLOW_SHAPES, ids=str)
def test_a_tiny_model_gives_the_tokens_of_transformers_on_fifteen_ranks_and_fewer(
    large_pool: RankPool, tiny: Reference, shape: tuple[int, int]
) -> None:
    arrivals = make_arrivals(250, [1, 2, 15, 16, 17, 40, 130, 700], max_tokens=12)
    check_tokens(large_pool, tiny, shape, arrivals, max_num_seqs=6, max_num_batched_tokens=96)


@pytest.mark.parametrize("batch", [1, 24])
def test_tokens_do_not_depend_on_how_many_share_the_batch(pool: RankPool, tiny: Reference, batch: int) -> None:
    lens = [1 + (37 * index) % 90 for index in range(batch)]
    check_tokens(pool, tiny, (2, 1), make_arrivals(250, lens, max_tokens=10, seed=batch), max_num_seqs=24)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_preemption_for_want_of_pages_changes_no_token(pool: RankPool, tiny: Reference, shape: tuple[int, int]) -> None:
    arrivals = make_arrivals(250, [60, 50, 40, 30, 20], max_tokens=60)
    with pool.mesh(tiny.folder, *shape, max_model_len=128, max_num_seqs=2) as mesh:
        page_bytes = mesh.infos[0].kv_bytes // (mesh.infos[0].num_kv_tokens // 16)
    fields = {"max_model_len": 128, "kv_memory_bytes": 12 * page_bytes, "max_num_seqs": 5}
    with pool.mesh(tiny.folder, *shape, **fields) as mesh:
        served = mesh.serve(arrivals)
    assert served.stats.num_preemptions > 0
    for arrival in arrivals:
        assert served.token_ids(arrival.request.request_id) == tiny.greedy(arrival.request.prompt_ids, 60)


@pytest.mark.parametrize("shape", QUICK_SHAPES, ids=str)
def test_smollm2_gives_the_tokens_of_transformers(pool: RankPool, smollm: Reference, shape: tuple[int, int]) -> None:
    arrivals = make_arrivals(49_152, [1, 9, 64], max_tokens=8)
    check_tokens(pool, smollm, shape, arrivals, max_num_seqs=4, max_num_batched_tokens=64)


@pytest.mark.parametrize("shape", SLOW_SHAPES, ids=str)
def test_smollm2_gives_the_tokens_of_transformers_on_fifteen_ranks_and_fewer(
    large_pool: RankPool, smollm: Reference, shape: tuple[int, int]
) -> None:
    arrivals = make_arrivals(49_152, [1, 9, 64], max_tokens=8)
    check_tokens(large_pool, smollm, shape, arrivals, max_num_seqs=4, max_num_batched_tokens=64)


@pytest.mark.slow
def test_smollm2_gives_the_tokens_of_transformers_for_long_prompts_in_a_large_batch(
    pool: RankPool, smollm: Reference
) -> None:
    lens = [1 + (97 * index) % 700 for index in range(23)] + [700]
    arrivals = make_arrivals(49_152, lens, max_tokens=6)
    check_tokens(pool, smollm, (2, 1), arrivals, max_num_seqs=24, max_num_batched_tokens=256, kv_memory_bytes=512 << 20)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_ranks_on_different_machines_give_the_tokens_of_transformers(
    pool: RankPool, tiny: Reference, shape: tuple[int, int]
) -> None:
    nodes = tuple(f"node{rank}" for rank in range(shape[0] * shape[1]))  # so the ranks talk over TCP
    check_tokens(pool, tiny, shape, make_arrivals(250, [5, 33, 130], max_tokens=8), nodes=nodes)


def test_tensor_split_and_stage_layers_change_no_token(pool: RankPool, tiny: Reference) -> None:
    arrivals = make_arrivals(250, [5, 33], max_tokens=8)
    check_tokens(pool, tiny, (2, 2), arrivals, tensor_split=(3.0, 1.0), stage_layers=(1, 4))


def test_more_tensor_ranks_than_heads_change_no_token(pool: RankPool, tmp_path: Path) -> None:
    reference = Reference(save_llama(tmp_path, num_attention_heads=3, num_key_value_heads=1))
    check_tokens(pool, reference, (5, 1), make_arrivals(250, [5, 33], max_tokens=8))


def test_seeded_sampling_gives_the_same_tokens_on_every_shape(pool: RankPool, tiny: Reference) -> None:
    params = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    arrivals = [
        Arrival(
            EngineRequest(
                request_id=f"r{index}",
                prompt_ids=tuple(range(3, 8 + 9 * index)),
                params=SamplingParams(seed=index, max_tokens=24, ignore_eos=True, logprobs=2, **params),
            ),
            after_step=3 * index,
        )
        for index in range(5)
    ]
    shapes = [(1, 1), (3, 1), (2, 2)]
    served = []
    for tp, pp in shapes:
        with pool.mesh(tiny.folder, tp, pp, max_num_seqs=2 + tp, max_num_batched_tokens=16 * tp) as mesh:
            served.append(mesh.serve(arrivals))
    for arrival in arrivals:
        request_id = arrival.request.request_id
        first = served[0].outputs[request_id]
        for other in served[1:]:
            assert other.token_ids(request_id) == served[0].token_ids(request_id)
            pairs = zip(first, other.outputs[request_id], strict=True)
            assert all(a.logprob == pytest.approx(b.logprob, abs=1e-3) for a, b in pairs)
    assert len({tuple(served[0].token_ids(f"r{index}")) for index in range(5)}) == 5
