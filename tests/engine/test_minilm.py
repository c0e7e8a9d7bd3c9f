"""A sentence encoder of the real world against sentence-transformers, which made it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from shardray import LLM
from shardray.runtime.model.sources import resolve_model

TEXTS = [
    "A shard dies, and no stream is lost.",
    "Ein Satz in einer anderen Sprache, mit Umlauten: äöü.",
    "short",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "1 + 1 = 2; 東京 🙂",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("all-minilm-l6-v2")


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 2)], ids=str)
def test_embeddings_are_those_of_sentence_transformers(
    folder: Path, expected: torch.Tensor, shape: tuple[int, int]
) -> None:
    """Pooled, and normalized, as the folder says; 12 heads on 5 ranks."""
    tp_size, pp_size = shape
    with LLM(
        folder, device="cpu", dtype="float32", tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size
    ) as llm:
        found = torch.stack(llm.embed(TEXTS))
    assert (found - expected).abs().max() < 1e-4
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))


def test_a_long_text_is_cut_where_sentence_transformers_cuts_it(folder: Path) -> None:
    text = "one two three four five six seven eight nine ten " * 60
    reference = SentenceTransformer(str(folder), device="cpu")
    with LLM(folder, device="cpu", dtype="float32") as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(text, max_len=256)
        [found] = llm.embed([ids])
    assert len(ids) == 256
    assert (found - torch.from_numpy(reference.encode(text))).abs().max() < 1e-4
