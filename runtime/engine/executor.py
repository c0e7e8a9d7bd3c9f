"""The leader's executor: every plan goes to the other ranks as one frame and to this rank's own runner."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import msgspec

from shardray.parallel.errors import MeshError
from shardray.parallel.link import Link
from shardray.parallel.mesh import Mesh
from shardray.runtime.engine.coming import ComingResult
from shardray.runtime.engine.runner import ShardRunner
from shardray.runtime.engine.step import StepPlan, StepResult, decode_plan, decode_result, encode

_GOODBYE = b""  # the frame after the last plan
_log = logging.getLogger(__name__)


class MeshExecutor:
    """Runs plans on a whole mesh (see the Executor protocol in loop.py).

    This rank's part is launched by a thread of its own, so that planning the next step overlaps with running the last
    one; who asks for a result waits for the device.
    """

    def __init__(self, mesh: Mesh, runner: ShardRunner, prepare_thread: Callable[[], None]) -> None:
        self._workers = [link for rank, link in sorted(mesh.links.items()) if rank != mesh.spec.rank]
        sampler_rank = mesh.spec.rank_at(mesh.spec.pp_size - 1, 0)
        self._sampler: Link | None = mesh.links.get(sampler_rank)  # None: this rank samples
        # They have something to tell of traced plans alone, and then before the last stage is done.
        self._between = [mesh.links[mesh.spec.rank_at(stage, 0)] for stage in range(1, mesh.spec.pp_size - 1)]
        self._timeout_s = mesh.spec.timeout_s
        self._runner = runner
        self._prepare_thread = prepare_thread
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._coming: queue.SimpleQueue[ComingResult | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_plans, name="shard-runner", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        if self._workers:
            frame = encode(plan)
            for link in self._workers:
                link.send(frame)
        self._plans.put(plan)

    def result(self) -> StepResult:
        """Raises MeshError, or whatever else the runner of this rank raised."""
        last = None if self._sampler is None else decode_result(self._sampler.recv(self._timeout_s))
        coming = self._coming.get()
        if isinstance(coming, Exception):
            raise coming
        own = coming.fetch()
        result = last or own
        assert result is not None
        return self._with_all_stages(own, result) if result.stages and last is not None else result

    def _with_all_stages(self, own: StepResult | None, last: StepResult) -> StepResult:
        """A traced result that has the time of every stage, in their order."""
        assert own is not None
        between = [decode_result(link.recv(self._timeout_s)) for link in self._between]
        return msgspec.structs.replace(last, stages=tuple(one.stages[0] for one in (own, *between, last)))

    def close(self) -> None:
        """End the runner's thread once the plans that it has are done, and take leave of the other ranks."""
        self._plans.put(None)
        self._thread.join()
        for link in self._workers:
            try:
                link.send(_GOODBYE)
            except MeshError as error:
                _log.debug("no goodbye to a rank: %s", error)

    def _run_plans(self) -> None:
        self._prepare_thread()
        while (plan := self._plans.get()) is not None:
            try:
                self._coming.put(self._runner.launch(plan))
            except Exception as error:
                self._coming.put(error)
                return


def serve_plans(mesh: Mesh, runner: ShardRunner) -> None:
    """The life of a rank that is not the leader: run plans until the leader says goodbye. Raises MeshError."""
    answers = _Answers(mesh)
    try:
        while frame := answers.next_plan():
            answers.add(runner.launch(decode_plan(frame)))
    finally:
        answers.close()


class _Answers:
    """Tells the leader what came of its plans, as soon as that is there.

    On a GPU a thread waits for it while the next plan is launched. What that thread meets with ends the rank as well.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._leader = mesh.links[0]
        self._is_pipeline = mesh.spec.pp_size > 1  # else the leader samples, and has all times
        self._coming: queue.SimpleQueue[ComingResult | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: MeshError | None = None

    def next_plan(self) -> bytes:
        """The leader's next frame. Raises what broke an earlier plan."""
        try:
            return self._leader.recv()
        except MeshError as error:
            raise self._failure or error from None

    def add(self, coming: ComingResult) -> None:
        if coming.is_there:
            self._answer(coming)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
            self._thread.start()
        self._coming.put(coming)

    def close(self) -> None:
        if self._thread is not None:
            self._coming.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            while (coming := self._coming.get()) is not None:
                self._answer(coming)
        except MeshError as error:
            self._failure = error
            self._leader.abort()  # the plans end as well

    def _answer(self, coming: ComingResult) -> None:
        result = coming.fetch()
        if result is not None and self._is_pipeline:
            self._leader.send(encode(result))
