"""Weights of 8 bits in the engine: what the cut and the batch change, and what a real model says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from shardray.runtime.engine.request import EngineRequest, SamplingParams
from shardray.runtime.model.quantize import quantize_folder
from shardray.runtime.model.sources import resolve_model
from tests.model.logits import LogitsOf
from tests.ranks import Arrival, RankPool
from tests.tiny_models import save_llama

# Heads and MLP of whole groups of 64, as those of most models are: then no cut goes through one
SHAPE = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 320}
NUM_TOKENS = 24
ARRIVALS = [
    Arrival(
        EngineRequest(
            request_id=f"r{n}",
            prompt_ids=tuple((5 * n + 3 * i) % 90 for i in range(9 * n + 4)),
            params=SamplingParams(seed=n, temperature=0.8 * (n % 2), max_tokens=NUM_TOKENS, ignore_eos=True),
        )
    )
    for n in range(5)
]
TEXT = (
    "The lamp burned all night. The boat came at noon, with oil and letters, and left at one. Before dark the keeper "
    "mended two panes with tin, wound the clock, and wrote in the log that the wind had gone round to the north-west."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("int8")
    quantize_folder(save_llama(source, **SHAPE), folder)
    return folder


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[tuple[int, int], list[list[int]]]:
    """Of every request, by the cut; (0, 0): each alone."""
    pool, found = RankPool(4), {}
    try:
        for cut in ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2)):
            with pool.mesh(folder, *cut) as mesh:
                served = mesh.serve(ARRIVALS)
                found[cut] = [served.token_ids(one.request.request_id) for one in ARRIVALS]
                if cut == (1, 1):
                    found[0, 0] = [mesh.serve([one]).token_ids(one.request.request_id) for one in ARRIVALS]
    finally:
        pool.close()
    return found


def test_batches_and_stages_change_no_token(tokens: dict[tuple[int, int], list[list[int]]]) -> None:
    assert [len(ids) for ids in tokens[0, 0]] == [NUM_TOKENS] * 5
    assert tokens[0, 0] == tokens[1, 1] == tokens[1, 2]
    assert tokens[2, 1] == tokens[2, 2]


@pytest.mark.parametrize("cut", [(2, 1), (3, 1)])
def test_tensor_ranks_change_a_token_at_a_near_tie_only(
    folder: Path, tokens: dict[tuple[int, int], list[list[int]]], cut: tuple[int, int]
) -> None:
    """A sum over ranks has another last bit, which sends a number to the next of the 255 that there are."""
    for arrival, ids in zip(ARRIVALS, tokens[cut], strict=True):
        prompt_ids = arrival.request.prompt_ids
        if not arrival.request.params.greedy:
            continue
        with LogitsOf(folder) as model:
            logits = model.step({0: [*prompt_ids, *ids]})[0][len(prompt_ids) - 1 : -1]
        gaps = logits.max(dim=1).values - logits[torch.arange(NUM_TOKENS), torch.tensor(ids)]
        assert gaps.max() < 0.01 * (logits.max() - logits.min())


def test_the_real_model_says_nearly_the_same(tmp_path: Path) -> None:
    source, quantized = resolve_model("smollm2-135m"), tmp_path / "int8"
    quantized.mkdir()
    quantize_folder(source, quantized)
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    logprobs = []
    for folder in (source, quantized):
        with LogitsOf(folder, "bfloat16") as model:
            logprobs.append(torch.log_softmax(model.step({0: ids})[0], dim=-1))
    expected, found = logprobs
    assert (expected.argmax(dim=-1) == found.argmax(dim=-1)).float().mean() > 0.8
    assert (expected.exp() * (expected - found)).sum(dim=-1).mean() < 0.05  # Kullback-Leibler, nats a token
