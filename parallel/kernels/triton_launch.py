"""Where kernels in Triton run, and how they are started.

They run on CUDA. With TRITON_INTERPRET=1 in the environment Triton runs them on CPU tensors instead, block by block in
Python: slow, and the way to check their results on a machine without a GPU. Triton reads the variable when a kernel is
defined, so it has to be set before this process imports any.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

# Programmatic dependent launch: a kernel is put onto the device while the one before it still runs, and waits there for
# its results. Never run yet; see docs/decisions/2026-11-29-triton-kernels.md.
EARLY_LAUNCH = False

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED_PROGRAMS = 3  # few, so that each takes several turns, as on a device


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can take this device's tensors."""
    on_device = device.type == "cuda" or (_INTERPRETED and device.type == "cpu")
    return on_device and importlib.util.find_spec("triton") is not None


@functools.cache
def num_programs(device: torch.device, programs_a_core: int) -> int:
    """How many programs of a persistent kernel to start: as many as the device holds at once."""
    if device.type == "cpu":
        return _INTERPRETED_PROGRAMS
    return programs_a_core * torch.cuda.get_device_properties(device).multi_processor_count


def launch_options(num_warps: int, num_stages: int = 3) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "EARLY": EARLY_LAUNCH}
    return options | {"launch_pdl": True} if EARLY_LAUNCH else options
