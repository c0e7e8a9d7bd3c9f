"""A name for a rank's weights as they lie in memory: two processes that give the same one hold the same bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.layers import packed_layout
from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.families.family import Family
from shardray.runtime.model.spec import DecoderSpec

_CODE = (Path(__file__).parent, Path(packed_layout.__code__.co_filename).parent)  # runtime/model and parallel


def weights_name(
    checkpoint: Checkpoint, family: Family, spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int,
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """Made of all that the bytes on a CPU depend on: the files, the slice of them, its dtype and layout, and the code.

    Files that are written anew, even in place and in the same size, give another name; so do those that are gone.
    """
    parts: list[object] = [_code_digest(), torch.__version__, packed_layout("cpu", dtype), dtype]
    parts += [family.name, spec, plan, stage, tp_rank, *sorted(checkpoint.tensors.items())]
    parts += _files({info.path for info in checkpoint.tensors.values()})
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return f"shardray-weights-{digest.hexdigest()[:32]}"


def _files(paths: Iterable[Path]) -> Iterable[tuple[str | int, ...]]:
    for path in sorted(paths):
        try:
            found = path.stat()
        except OSError:
            yield str(path), "gone"
            continue
        where = str(path.resolve()), found.st_dev, found.st_ino
        yield *where, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
