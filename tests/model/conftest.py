"""The real model and a tiny one, as folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer
from tests.model.gguf_writing import tiny_llama, write_gguf


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct out of the local cache, fetched by the first test ever to ask for it."""
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_folder)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a SentencePiece vocabulary, converted from GGUF."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    return resolve_model(str(write_gguf(folder / "tiny.gguf", tiny_llama())), cache_dir=folder)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_folder: Path) -> Tokenizer:
    return Tokenizer.load(sentencepiece_folder)
