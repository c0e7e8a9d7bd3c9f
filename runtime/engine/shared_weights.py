"""A rank's weights, in memory that it shares with others of its machine which hold the same ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.huge_pages import can_be_shared
from shardray.parallel.kept import keeping_in
from shardray.parallel.layers import can_share, is_packed
from shardray.parallel.plan import ShardPlan
from shardray.parallel.segment import open_segment
from shardray.runtime.engine.assignment import ShardAssignment
from shardray.runtime.engine.memory import rank_memory
from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.model.weights_name import weights_name

_SLACK_BYTES = 64 << 20  # address space for what packing rounds up


@contextmanager
def keep_weights(
    assignment: ShardAssignment,
    checkpoint: Checkpoint,
    served: ServedSpec,
    plan: ShardPlan,
    progress: Callable[[str, float], None],
) -> Iterator[int]:
    """Weights that are loaded meanwhile are shared, if ``shares`` says so.

    Gives the bytes of those that another process loaded, which are all or none.
    """
    device_type = torch.device(assignment.device).type
    if not shares(assignment.share_weights, device_type, served.dtype):
        yield 0
        return
    stage, tp_rank = divmod(assignment.rank, assignment.tp_size)
    num_bytes = rank_memory(served, plan, stage, tp_rank, is_packed(device_type, served.dtype)).weight_bytes

    def waiting(num_there: int) -> None:
        progress("loading", min(1.0, num_there / max(1, num_bytes)))

    def name() -> str:
        what = weights_name(checkpoint, served.family, served.spec, plan, stage, tp_rank, served.dtype)
        return f"{what}-{_memory_nodes()}"

    named = name()
    with open_segment(named, 2 * num_bytes + _SLACK_BYTES, waiting) as segment, keeping_in(segment):
        yield 0 if segment is None else segment.num_borrowed_bytes
        if segment is not None and not segment.is_filled and name() != named:
            segment.spoil("the checkpoint was changed while it was read")


def shares(wanted: bool | None, device_type: str, dtype: torch.dtype) -> bool:
    """Whether processes of one machine hold weights once. ``wanted`` None: where that makes them no slower to read."""
    return (can_be_shared() if wanted is None else wanted) and can_share(device_type, dtype)


def _memory_nodes() -> str:
    """Of the cores that this thread may use: ranks of one socket do not read weights through another's."""
    cores = (Path(f"/sys/devices/system/cpu/cpu{core}") for core in os.sched_getaffinity(0))
    nodes = {int(node.name.removeprefix("node")) for core in cores for node in core.glob("node[0-9]*")}
    return ".".join(map(str, sorted(nodes)))
