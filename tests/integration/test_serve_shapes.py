"""``shardray serve`` in each shape, asked by ``shardray generate``: the real model, the tokens of transformers."""

from __future__ import annotations

import json

import pytest

from shardray import Client
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer
from tests.command import Command, shardray
from tests.tiny_models import Reference

pytestmark = pytest.mark.integration

PROMPT = "The capital of France is"
NUM_TOKENS = 24
SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (5, 1)]
QUICK = [(3, 1), (2, 2)]  # the others, and more, run without Ray in tests/engine/test_same_tokens.py


@pytest.fixture(scope="module")
def expected() -> list[int]:
    folder = resolve_model("smollm2-135m")
    prompt_ids = Tokenizer.load(folder).encode(PROMPT)
    return Reference(folder).greedy(tuple(prompt_ids), NUM_TOKENS)


@pytest.mark.parametrize(
    "shape", [shape if shape in QUICK else pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES], ids=str
)
def test_a_served_shape_gives_the_tokens_of_transformers(expected: list[int], shape: tuple[int, int]) -> None:
    tp_size, pp_size = shape
    settings = [
        "model.source=smollm2-135m",
        "model.dtype=float32",
        "model.max_model_len=512",
        "engine.kv_memory_bytes=64MiB",
        "grpc.listen=127.0.0.1:0",
        f"parallel.tensor_parallel_size={tp_size}",
        f"parallel.pipeline_parallel_size={pp_size}",
    ]
    command = Command(("serve", "--json", *(word for setting in settings for word in ("--set", setting))))
    try:
        event = command.until_event("serving")
        assert len(event["shards"]) == tp_size * pp_size
        options = ("--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--ignore-eos", "--json")
        lines = shardray("generate", PROMPT, "--server", event["address"], *options).splitlines()
        assert_every_rank_is_traced(event["address"], shape)
    finally:
        command.process.terminate()
        command.process.communicate(timeout=60)
    assert [token_id for line in lines for token_id in json.loads(line).get("token_ids", [])] == expected
    assert command.left_behind() == []


def assert_every_rank_is_traced(address: str, shape: tuple[int, int]) -> None:
    """While a stream runs."""
    tp_size, pp_size = shape
    with Client(address, timeout_s=60) as client:
        stream = client.stream(PROMPT, max_tokens=400, temperature=0.0, ignore_eos=True)
        next(stream)
        ranks = client.trace(2.0)
        stream.close()
    assert [(rank.stage, rank.tp_rank) for rank in ranks] == [divmod(r, tp_size) for r in range(tp_size * pp_size)]
    for rank in ranks:
        expected = {"step", *(["collective"] if tp_size > 1 else []), *(["bubble"] if rank.stage > 0 else [])}
        expected |= {"hand-over"} if rank.stage < pp_size - 1 else set()
        assert {span.kind for span in rank.spans} == expected, (rank.rank, len(rank.spans))
        assert rank.clock_error_ns == 0
