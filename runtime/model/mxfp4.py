"""MXFP4 checkpoints, dequantized as they are read: blocks of 32 four-bit floats along the input, each with a scale.

    NAME_blocks (..., out, in / 32, 16) uint8    two values a byte, the lower half first
    NAME_scales (..., out, in / 32) uint8        exponents, 127 is 2 ** 0

OCP Microscaling Formats (MX) Specification 1.0. Values are 1 sign, 2 exponent and 1 mantissa bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardray.parallel.checkpoint import Checkpoint

_BLOCK = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])
_BIAS = 127


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the checkpoint holds a tensor in this form."""
    return f"{name}_blocks" in checkpoint.tensors


def packed_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors that hold one of ``shape`` (..., out, in), and their shapes."""
    scales = (*shape[:-1], -(-shape[-1] // _BLOCK))
    return {f"{name}_blocks": (*scales, _BLOCK // 2), f"{name}_scales": scales}


def read_packed(checkpoint: Checkpoint, name: str, index: tuple[slice, ...]) -> Tensor:
    """The part ``index`` of a tensor (..., out, in), float32. Reads the blocks that it touches, and no others."""
    *outer, columns = index
    first, last = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
    blocks = checkpoint.read_bytes(f"{name}_blocks", (*outer, slice(first, last)))
    scales = checkpoint.read_bytes(f"{name}_scales", (*outer, slice(first, last)))
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # (..., blocks, 32)
    values = torch.ldexp(_VALUES[halves.long()], scales.to(torch.int32)[..., None] - _BIAS).flatten(-2)
    return values[..., columns.start - first * _BLOCK : columns.stop - first * _BLOCK]
