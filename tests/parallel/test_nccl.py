"""What is done with NCCL's answers. The rest needs GPUs: tests/gpu/."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardray.parallel.comm import NcclComm
from shardray.parallel.errors import CollectiveTimeout, PeerLost


class Work:
    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.waited = False

    def wait(self) -> None:
        self.waited = True
        if self.error is not None:
            raise RuntimeError(self.error)


class Group:
    """Answers each operation as torch's process group does: with work to wait for, or with nothing."""

    def __init__(self, work: Work | None) -> None:
        self.work = work
        self.on_current_stream: list[bool] = []

    def _answer(self, options: Any) -> Work | None:
        self.on_current_stream.append(not options.asyncOp)
        return self.work

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Work | None:
        tensors[0] *= 2
        return self._answer(options)

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, options: Any) -> Work | None:
        out[:] = x
        return self._answer(options)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Work | None:
        return self._answer(options)


def comm_over(work: Work | None) -> tuple[NcclComm, Group]:
    group = Group(work)
    return NcclComm(group, 0, 2, 3.0, "tensor group"), group


@pytest.mark.parametrize("work", [None, Work()], ids=["done on the current stream", "work"])
def test_collectives_take_either_answer(work: Work | None) -> None:
    comm, group = comm_over(work)
    assert comm.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    assert comm.all_gather(torch.ones(2)).tolist() == [[1.0, 1.0]] * 2
    gathered = comm.gather(torch.ones(1, 2), (2, 1))
    assert gathered is not None
    assert gathered.tolist() == [[1.0] * 3]
    assert comm.broadcast(torch.ones(1)).tolist() == [1.0]
    assert group.on_current_stream == [True] * 4
    assert work is None or work.waited


@pytest.mark.parametrize(("message", "kind"), [("Watchdog: timed out", CollectiveTimeout), ("reset by peer", PeerLost)])
def test_what_nccl_says_went_wrong_breaks_the_mesh(message: str, kind: type[Exception]) -> None:
    comm, _ = comm_over(Work(message))
    with pytest.raises(kind):
        comm.all_reduce(torch.ones(1))
