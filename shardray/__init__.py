"""Serves one decoder from many GPUs: Ray places the shards, NCCL joins them, gRPC streams the tokens.

The public names are loaded on first use, so that ``import shardray`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardray.runtime.client import Access, AsyncClient, Client
    from shardray.runtime.engine.llm import LLM
    from shardray.runtime.engine.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Access", "AsyncClient", "Client", "SamplingParams", "__version__"]

_HOME = {
    "LLM": "shardray.runtime.engine.llm",
    "Access": "shardray.runtime.client",
    "Client": "shardray.runtime.client",
    "AsyncClient": "shardray.runtime.client",
    "SamplingParams": "shardray.runtime.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shardray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
