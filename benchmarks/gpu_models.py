"""Models of well-known shapes with random weights, for a GPU: how long things take, not what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardray.runtime.model.random_model import write_model

_LONG = {"max_position_embeddings": 16384}
SHAPES: dict[str, dict[str, Any]] = {
    # SmolLM2-135M
    "135M": _LONG | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152},
    # Llama-3.2-1B
    "1B": _LONG | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256},
    # Llama-3.1-8B
    "8B": _LONG | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128, "tie_word_embeddings": False},
    # to try the script out
    "tiny": _LONG | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "vocab_size": 512, "head_dim": 32},
}  # fmt: skip


def folder_of(name: str, root: Path) -> Path:
    """Written if it is not there: for 8B that takes 16 GB, best of memory (/dev/shm), and about half a minute."""
    return write_model(root / f"shardray-random-{name}", SHAPES[name])
