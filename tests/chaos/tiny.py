"""A random Llama that is quick to load: the chaos is then mostly in the fleet, not in the products."""

from __future__ import annotations

from pathlib import Path

from tests.stub_tokenizer import EOS_ID, write_tokenizer
from tests.tiny_models import save_llama


def save_tiny(folder: Path) -> Path:
    """Its tokens are bytes."""
    return write_tokenizer(save_llama(folder, vocab_size=EOS_ID + 1, eos_token_id=EOS_ID), keep_config=True)
