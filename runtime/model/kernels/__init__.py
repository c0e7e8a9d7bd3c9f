"""The operations of a layer besides its matrix products: a reference in torch, and faster ones for a device."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

import torch

from shardray.parallel.kernels.triton_launch import runs_triton
from shardray.runtime.model.kernels.ops import Ops

if TYPE_CHECKING:
    from shardray.parallel.kernels.program import Recorder

_log = logging.getLogger(__name__)


def choose_ops(device: torch.device, dtype: torch.dtype, num_threads: int) -> Ops:
    """The fastest operations there are for a device and dtype."""
    if runs_triton(device):
        from shardray.runtime.model.kernels import triton_ops

        return triton_ops.TritonOps() if triton_ops.supports(dtype) else Ops()
    if device.type != "cpu":
        _log.warning("triton is not installed: CUDA kernels run as torch calls, far slower; pip install triton")
        return Ops()
    if importlib.util.find_spec("numba") is None:
        _log.warning("numba is not installed: CPU kernels run as torch calls, slower; pip install 'shardray[cpu]'")
        return Ops()
    from shardray.runtime.model.kernels import cpu_ops

    return cpu_ops.CpuOps(dtype, num_threads) if cpu_ops.supports(dtype) else Ops()


def choose_recorder(device: torch.device) -> Recorder | None:
    """What records decode steps on a device, if anything does."""
    if device.type != "cpu" or runs_triton(device) or importlib.util.find_spec("numba") is None:
        return None
    from shardray.parallel.kernels.program import Recorder

    return Recorder()
