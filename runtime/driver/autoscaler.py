"""Watches the load of a fleet and asks its operator for more replicas, or fewer."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable

from shardray.runtime.config import AutoscalingSettings
from shardray.runtime.driver.autoscale import LoadHistory, LoadSample, decide
from shardray.runtime.driver.fleet import Fleet, FleetState
from shardray.runtime.driver.operations import FleetOperator, OperationConflictError, OperationError, ShapeChange

_log = logging.getLogger(__name__)
_NOT_SERVING = (FleetState.STOPPING, FleetState.FAILED)  # now, nor in a moment


class Autoscaler:
    """Only acts if ``settings.max_replicas`` is set. Use it in the fleet's loop."""

    def __init__(
        self,
        settings: AutoscalingSettings,
        fleet: Fleet,
        operator: FleetOperator,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._operator = operator
        self._clock = clock
        self._history = LoadHistory()
        self._patience_end_s = -math.inf  # after an attempt that failed

    async def run(self) -> None:
        """Until it is cancelled; returns at once if there is nothing to scale. A scale under way then goes on."""
        while self._settings.max_replicas is not None:
            await asyncio.sleep(self._settings.metrics_interval_s)
            try:
                await self.look()
            except Exception:  # nobody waits for this task: without a word the load would be left to itself
                _log.exception("the autoscaler failed; it looks again")

    async def look(self) -> None:
        """Take a sample, and scale if it is time to. A fleet that is given up as a whole is left to the operator."""
        status = self._fleet.snapshot()
        num_replicas = sum(replica.state not in _NOT_SERVING for replica in status.replicas)
        if status.state is FleetState.STOPPING or num_replicas == 0:
            return
        sample = LoadSample(self._clock(), status.num_live_requests)
        before = self._history
        target, self._history = decide(self._settings, before, sample, num_replicas)
        if target == num_replicas or sample.time_s < self._patience_end_s:
            return
        try:
            await self._scale(num_replicas, target)
        except OperationConflictError:  # still due when the other operation has ended
            self._history = dataclasses.replace(self._history, leaning=before.leaning)
        except OperationError as error:
            self._patience_end_s = sample.time_s + self._settings.upscale_delay_s
            _log.warning("autoscaling from %d to %d replicas: %s", num_replicas, target, error)

    async def _scale(self, num_replicas: int, target: int) -> None:
        load = self._history.mean_ongoing
        _log.info("autoscaling from %d to %d replicas for %.1f requests in flight", num_replicas, target, load)
        async for _ in self._operator.scale(ShapeChange(replicas=target)):
            pass
