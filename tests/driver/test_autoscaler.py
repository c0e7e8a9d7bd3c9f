"""The autoscaler asks the operator when it is time to, and bears being refused."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

from shardray.runtime.config import AutoscalingSettings
from shardray.runtime.driver.autoscaler import Autoscaler
from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.driver.operations import (
    FleetOperator,
    OperationConflictError,
    OperationFailedError,
    OperationProgress,
    OperationRefusedError,
    ShapeChange,
)

pytestmark = pytest.mark.asyncio
SETTINGS = AutoscalingSettings(
    max_replicas=4, target_ongoing_requests=2, upscale_delay_s=10, downscale_delay_s=20, look_back_period_s=1
)


class Replicas(FleetOperator):
    """Sets the number of replicas of a fleet at once, or raises."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.asked: list[ShapeChange] = []
        self.error: Exception | None = None

    async def scale(self, change: ShapeChange) -> AsyncIterator[OperationProgress]:
        self.asked.append(change)
        if self.error is not None:
            raise self.error
        yield OperationProgress("scaling", 0.0)
        assert change.replicas is not None
        for replica_id in range(4):
            if replica_id < change.replicas:
                self.fleet.set_ready(replica_id, [])
            else:
                self.fleet.remove(replica_id)


class Scaled:
    """A fleet under an autoscaler whose clock the test moves."""

    def __init__(self, settings: AutoscalingSettings = SETTINGS) -> None:
        self.fleet = Fleet("m")
        self.fleet.set_ready(0, [])
        self.operator = Replicas(self.fleet)
        self.now_s = 0.0
        self.autoscaler = Autoscaler(settings, self.fleet, self.operator, clock=lambda: self.now_s)

    async def under(self, load: int, seconds: int) -> int:
        """The number of replicas after that load for so long, looked at each second."""
        for _ in range(seconds):
            self.fleet.set_requests(0, load)
            await self.autoscaler.look()
            self.now_s += 1.0
        return len(self.fleet.ready_replicas())


async def test_replicas_come_with_the_load_and_go_with_it() -> None:
    scaled = Scaled()
    assert await scaled.under(6, seconds=10) == 1
    assert await scaled.under(6, seconds=1) == 3
    assert await scaled.under(6, seconds=100) == 3
    assert await scaled.under(0, seconds=15) == 3
    assert await scaled.under(0, seconds=15) == 1
    assert scaled.operator.asked == [ShapeChange(replicas=3), ShapeChange(replicas=1)]


async def test_while_another_operation_is_under_way_it_asks_again_at_every_look() -> None:
    scaled = Scaled()
    scaled.operator.error = OperationConflictError("busy")
    assert await scaled.under(6, seconds=12) == 1
    assert len(scaled.operator.asked) == 2
    scaled.operator.error = None
    assert await scaled.under(6, seconds=1) == 3


async def test_a_refusal_is_logged_and_asked_again_after_the_delay(caplog: pytest.LogCaptureFixture) -> None:
    scaled = Scaled()
    scaled.operator.error = OperationRefusedError("3 hosts are needed, 1 is there")
    assert await scaled.under(6, seconds=25) == 1
    assert len(scaled.operator.asked) == 2
    assert "autoscaling from 1 to 3 replicas: 3 hosts are needed, 1 is there" in caplog.text


async def test_a_recovering_replica_counts_and_a_stopping_fleet_is_left_alone() -> None:
    scaled = Scaled()
    scaled.fleet.set_recovering(0, "placing a host")
    assert await scaled.under(2, seconds=30) == 0
    assert scaled.operator.asked == []
    scaled.fleet.stop("shutting down")
    await scaled.under(100, seconds=30)
    assert scaled.operator.asked == []


async def test_a_replica_that_was_given_up_does_not_count() -> None:
    scaled = Scaled()
    scaled.fleet.set_ready(1, [])
    scaled.fleet.set_failed(1, "given up after 5 failures in a row")
    assert await scaled.under(3, seconds=11) == 2, "the one that serves cannot carry the load of two"
    assert scaled.operator.asked == [ShapeChange(replicas=2)]


async def test_a_fleet_below_its_bounds_is_not_formed_again_and_again() -> None:
    scaled = Scaled(dataclasses.replace(SETTINGS, min_replicas=2))
    scaled.fleet.set_failed(1, "given up after 5 failures in a row")
    scaled.operator.error = OperationFailedError("replica 1: a host died")
    await scaled.under(0, seconds=25)
    assert len(scaled.operator.asked) == 3, "at once, and then once in upscale_delay_s"


async def test_a_fleet_that_was_given_up_is_left_to_the_operator() -> None:
    scaled = Scaled()
    scaled.fleet.set_failed(0, "given up after 5 failures in a row")
    await scaled.under(6, seconds=30)
    assert scaled.operator.asked == []


async def test_it_looks_by_itself_until_it_is_cancelled_whatever_went_wrong(caplog: pytest.LogCaptureFixture) -> None:
    eager = AutoscalingSettings(
        max_replicas=2, target_ongoing_requests=1, upscale_delay_s=0, metrics_interval_s=0.01, look_back_period_s=1
    )
    scaled = Scaled(eager)
    scaled.fleet.set_requests(0, 5)
    scaled.operator.error = KeyError("a defect of ours")
    running = asyncio.create_task(scaled.autoscaler.run())
    async with asyncio.timeout(5):
        while len(scaled.operator.asked) < 2:
            await asyncio.sleep(0.01)
        assert "a defect of ours" in caplog.text
        scaled.operator.error = None
        while len(scaled.fleet.ready_replicas()) < 2:
            await asyncio.sleep(0.01)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_without_a_maximum_it_does_nothing() -> None:
    async with asyncio.timeout(1):
        await Scaled(AutoscalingSettings()).autoscaler.run()
