"""One tokenizer for all tests of the driver."""

from __future__ import annotations

import pytest

from shardray.runtime.model.tokenizer import Tokenizer
from tests.stub_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
