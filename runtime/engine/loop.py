"""The step loop: plan -> run -> commit -> publish, with the next step planned while the last one runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from shardray.runtime.engine.limits import SchedulerLimits
from shardray.runtime.engine.request import (
    EngineRequest,
    EngineStats,
    FieldError,
    FinishReason,
    ServedModel,
    TokenOutput,
)
from shardray.runtime.engine.scheduler import Scheduler
from shardray.runtime.engine.step import StepPlan, StepResult

Publish = Callable[[list[TokenOutput]], None]
_IMBALANCE_PERIOD = 64  # steps between two looks at how experts are loaded
_SMOOTHING = 0.05  # weight of the newest step in the smoothed times


class Executor(Protocol):
    """Runs plans on a mesh in the order they are given, and returns their results in that order."""

    def submit(self, plan: StepPlan) -> None:
        """Hand over a plan; does not wait for it to run."""

    def result(self) -> StepResult:
        """Wait for the oldest plan's result. Raises what broke the mesh."""


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class _ForgetPrefixes:
    pass


_Message = EngineRequest | _Cancel | _ForgetPrefixes | None


class Engine:
    """Continuous batching over one mesh. ``run`` belongs to one thread; everything else is safe from any."""

    def __init__(
        self, limits: SchedulerLimits, executor: Executor, info: ServedModel,
        expert_imbalance: Callable[[], float] = lambda: 0.0,
    ) -> None:  # fmt: skip
        self.info = info
        self._limits = limits
        self._scheduler = Scheduler(limits)
        self._executor = executor
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._num_in_flight = 0
        self._stats = self._scheduler.stats()
        self._step_time_s = self._plan_time_s = 0.0
        self._measure_imbalance = expert_imbalance
        self._expert_imbalance = 0.0
        self._stopping = threading.Event()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises FieldError at once if it could never run."""
        request.check(self.info)
        self._limits.check(request)
        self._inbox.put(request)

    def cancel(self, request_id: str) -> None:
        """End a request before its next step; its end is published if it was live."""
        self._inbox.put(_Cancel(request_id))

    def forget_prefixes(self) -> None:
        """Requests whose first step is yet to come share nothing with those before."""
        self._inbox.put(_ForgetPrefixes())

    def stop(self) -> None:
        """Make ``run`` return after the step at hand; live requests wait until it is called again."""
        self._stopping.set()
        self._inbox.put(None)

    def stats(self) -> EngineStats:
        """A snapshot as of the last step."""
        return self._stats

    def run(self, publish: Publish) -> None:
        """Run until ``stop``; ``publish`` gets each step's tokens, also none. Raises what broke the mesh. Idle costs
        nothing."""
        while not self._stopping.is_set():
            outputs = self._receive()
            began = time.perf_counter()
            self._launch()
            planned = time.perf_counter()
            if self._num_in_flight:
                result = self._executor.result()
                ran = time.perf_counter()
                self._num_in_flight -= 1
                outputs += self._scheduler.commit(result)
                self._measure(began, planned, ran)
            self._stats = self._snapshot()
            publish(outputs)
        self._stopping.clear()

    def _receive(self) -> list[TokenOutput]:
        """Take in what has arrived; sleeps while there is nothing to do at all."""
        outputs: list[TokenOutput] = []
        while not self._stopping.is_set():
            idle = not self._scheduler.has_work and not outputs
            if idle:
                self._scheduler.check_idle()
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                break
            if output := self._take(message):
                outputs.append(output)
        return outputs

    def _take(self, message: _Message) -> TokenOutput | None:
        match message:
            case EngineRequest():
                try:
                    return self._scheduler.add(message)
                except FieldError as error:
                    return TokenOutput(message.request_id, finish_reason=FinishReason.ERROR, error=str(error))
            case _Cancel(request_id):
                return self._scheduler.cancel(request_id)
            case _ForgetPrefixes():
                self._scheduler.forget_prefixes()
        return None

    def _launch(self) -> None:
        while (plan := self._scheduler.plan()) is not None:
            self._executor.submit(plan)
            self._num_in_flight += 1

    def _measure(self, began: float, planned: float, ran: float) -> None:
        control_s = planned - began + time.perf_counter() - ran
        self._step_time_s += _SMOOTHING * (ran - began - self._step_time_s)
        self._plan_time_s += _SMOOTHING * (control_s - self._plan_time_s)

    def _snapshot(self) -> EngineStats:
        stats = self._scheduler.stats()
        if stats.num_steps % _IMBALANCE_PERIOD == 0 or not self._scheduler.has_work:
            self._expert_imbalance = self._measure_imbalance()
        return msgspec.structs.replace(
            stats,
            step_time_s=self._step_time_s,
            plan_time_s=self._plan_time_s,
            expert_imbalance=self._expert_imbalance,
        )
