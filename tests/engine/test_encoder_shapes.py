"""Families with an encoder on every small shape: the tokens and embeddings of transformers, many requests together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardray.runtime.engine.request import EngineRequest, SamplingParams
from shardray.runtime.model.spec import Pooling
from tests.engine.test_family_shapes import MAX_TOKENS, PROMPT_LENS, QUICK_SHAPES, SHAPES, serve_short_of_pages
from tests.engine.test_same_tokens import make_arrivals
from tests.model.encoder_zoo import ENCODERS, PAIRS, EncoderReference, PairReference, save_encoder
from tests.ranks import RankPool

FIELDS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128}


@pytest.mark.parametrize(
    "shapes", [[*QUICK_SHAPES, (1, 5)], pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["quick", "all"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_gives_the_tokens_of_transformers(
    pool: RankPool, name: str, shapes: list[tuple[int, int]], tmp_path: Path
) -> None:
    reference = PairReference(save_encoder(name, tmp_path))
    arrivals = make_arrivals(97, PROMPT_LENS, MAX_TOKENS)
    expected = {
        arrival.request.request_id: reference.greedy(arrival.request.prompt_ids, MAX_TOKENS) for arrival in arrivals
    }
    for tp_size, pp_size in shapes:
        if pp_size > reference.model.config.num_hidden_layers * 2:
            continue  # fewer layers than stages
        with pool.mesh(tmp_path, tp_size, pp_size, **FIELDS) as mesh:
            served = mesh.serve(arrivals)
        assert {request_id: served.token_ids(request_id) for request_id in served.outputs} == expected
        assert served.stats.num_used_pages == 0
    long = make_arrivals(97, PROMPT_LENS, 60)
    found = serve_short_of_pages(pool, tmp_path, long, 64, max_num_batched_tokens=64)
    for arrival in long:
        request = arrival.request
        assert found[request.request_id] == reference.greedy(request.prompt_ids, 60)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 1)], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_the_embeddings_of_transformers(
    pool: RankPool, name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    reference = EncoderReference(save_encoder(name, tmp_path))
    modes = [Pooling(), Pooling("cls"), Pooling("last", normalize=True)]
    requests = [
        EngineRequest(
            request_id=arrival.request.request_id,
            prompt_ids=arrival.request.prompt_ids,
            params=SamplingParams(),
            pooling=modes[index % 3],
        )
        for index, arrival in enumerate(make_arrivals(97, PROMPT_LENS * 3, 1))
    ]
    with pool.mesh(tmp_path, *shape, **FIELDS) as mesh:
        served = mesh.serve(requests)
    for request in requests:
        [output] = served.outputs[request.request_id]
        assert output.embedding is not None
        assert request.pooling is not None
        found = torch.frombuffer(bytearray(output.embedding), dtype=torch.float32)
        expected = reference.embedding(request.prompt_ids, request.pooling)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert served.stats.num_used_pages == 0
