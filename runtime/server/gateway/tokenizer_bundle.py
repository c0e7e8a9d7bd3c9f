"""A model's tokenizer as a file that a gateway can take."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from smg_grpc_proto.generated import common_pb2

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
_CHUNK_BYTES = 64 * 1024


def zip_tokenizer(folder: Path) -> bytes:
    """The files that tokenizing and chat templates take, and none of the weights. Some tenths of a second."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _FILES:
            if (folder / name).is_file():
                archive.write(folder / name, name)
    return packed.getvalue()


def in_chunks(packed: bytes) -> Iterator[common_pb2.GetTokenizerChunk]:
    """The last one has the SHA-256 of all."""
    for first in range(0, len(packed), _CHUNK_BYTES):
        is_last = first + _CHUNK_BYTES >= len(packed)
        sha256 = hashlib.sha256(packed).hexdigest() if is_last else ""
        yield common_pb2.GetTokenizerChunk(data=packed[first : first + _CHUNK_BYTES], sha256=sha256)
