"""An operation tells what it is at and what it waits for, to its listener and in the fleet's status."""

from __future__ import annotations

import asyncio

import pytest

from shardray.runtime.driver import operation_run
from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.driver.operation_run import OperationRun, Say
from shardray.runtime.driver.operations import OperationFailedError, OperationKind

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_run, "REPEAT_S", 0.05)


async def test_a_step_that_takes_long_is_told_again_with_what_it_waits_for() -> None:
    may_end = asyncio.Event()

    async def work(say: Say) -> None:
        say("forming replica 1", 0.5)
        await may_end.wait()

    run = OperationRun(OperationKind.SCALE, Fleet("m"), work)
    run_steps = run.steps()
    assert (await anext(run_steps)).doing == "forming replica 1"
    run.note("replica 1: needs 2 GPU bundles")
    again = await anext(run_steps)
    assert (again.doing, again.fraction) == ("forming replica 1, for 0 s: replica 1: needs 2 GPU bundles", 0.5)
    may_end.set()
    assert [step.doing async for step in run_steps][-1] == "done"


async def test_what_a_step_waited_for_is_forgotten_with_it() -> None:
    may_end = asyncio.Event()

    async def work(say: Say) -> None:
        say("one", 0.0)
        await asyncio.sleep(0.01)
        say("two", 0.5)
        await may_end.wait()

    run = OperationRun(OperationKind.RESTART, Fleet("m"), work)
    run_steps = run.steps()
    await anext(run_steps)
    run.note("no room")
    assert [(await anext(run_steps)).doing for _ in range(2)] == ["two", "two, for 0 s"]
    may_end.set()


async def test_the_fraction_never_goes_back() -> None:
    async def work(say: Say) -> None:
        for fraction in (0.1, 0.5, 0.2, 0.6):
            say("a part", fraction)

    steps = OperationRun(OperationKind.RELOAD, Fleet("m"), work).steps()
    assert [step.fraction async for step in steps] == [0.1, 0.5, 0.5, 0.6, 1.0]


async def test_the_fleet_shows_the_operation_until_it_has_ended_however_it_ends() -> None:
    fleet, may_fail = Fleet("m"), asyncio.Event()

    async def work(say: Say) -> None:
        say("fetching org/name", 0.0)
        await may_fail.wait()
        raise OperationFailedError("it is gone")

    run_steps = OperationRun(OperationKind.RELOAD, fleet, work).steps()
    await anext(run_steps)
    operation = fleet.snapshot().operation
    assert operation is not None
    assert (operation.kind, operation.progress.doing) == (OperationKind.RELOAD, "fetching org/name")
    may_fail.set()
    with pytest.raises(OperationFailedError, match="it is gone"):
        async for _ in run_steps:
            pass
    assert fleet.snapshot().operation is None


async def test_it_goes_on_without_a_listener_until_it_is_broken_off() -> None:
    ended = asyncio.Event()

    async def work(say: Say) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    fleet = Fleet("m")
    run = OperationRun(OperationKind.DRAIN, fleet, work)
    await asyncio.sleep(0.06)
    operation = fleet.snapshot().operation
    assert run.is_under_way
    assert not ended.is_set()
    assert operation is not None
    assert operation.progress.doing == "starting, for 0 s"
    await run.cancel()
    assert ended.is_set()
    assert (run.is_under_way, fleet.snapshot().operation) == (False, None)
