"""The operations of a layer besides its matrix products: a reference in torch, and faster ones for a device.

Kernels for CUDA take their place here beside the CPU's.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

import torch

from shardray.runtime.model.kernels.ops import Ops

if TYPE_CHECKING:
    from shardray.parallel.kernels.program import Recorder

_log = logging.getLogger(__name__)


def choose_ops(device: torch.device, dtype: torch.dtype, num_threads: int) -> Ops:
    """The fastest operations there are for a device and dtype."""
    if device.type != "cpu":
        return Ops()
    if importlib.util.find_spec("numba") is None:
        _log.warning("numba is not installed: CPU kernels run as torch calls, slower; pip install 'shardray[cpu]'")
        return Ops()
    from shardray.runtime.model.kernels import cpu_ops

    return cpu_ops.CpuOps(dtype, num_threads) if cpu_ops.supports(dtype) else Ops()


def choose_recorder(device: torch.device) -> Recorder | None:
    """What records decode steps on a device, if anything does."""
    if device.type != "cpu" or importlib.util.find_spec("numba") is None:
        return None
    from shardray.parallel.kernels.program import Recorder

    return Recorder()
