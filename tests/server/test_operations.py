"""Scale, Reload, Restart and Drain over gRPC, and what the fleet tells of recovery."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shardray.runtime.client import AsyncClient, Progress, ServerError
from shardray.runtime.cluster.reports import FailureKind, RankFailure
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.operations import OperationKind, OperationProgress, OperationStatus, ShapeChange
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.v1 import control_pb2
from tests.serving import Serving, eventually, serving
from tests.stub_operator import StubOperator

pytestmark = pytest.mark.asyncio


@contextlib.asynccontextmanager
async def operated(tokenizer: Tokenizer, **options: float) -> AsyncIterator[tuple[Serving, StubOperator]]:
    """A server with one stub replica and an operator that can add more."""
    operators: list[StubOperator] = []

    def make(driver: Driver) -> StubOperator:
        operators.append(StubOperator(driver))
        return operators[0]

    try:
        async with serving(tokenizer, operator=make, **options) as up:
            yield up, operators[0]
    finally:
        operators[0].kill_added()


async def all_of(steps: AsyncIterator[Progress]) -> list[Progress]:
    return [step async for step in steps]


async def refusal(steps: AsyncIterator[Progress]) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await all_of(steps)
    return caught.value


async def test_a_scale_streams_its_steps_while_requests_go_on(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer, step_time_s=0.02) as (up, operator):
        stream = up.client.stream("abc", max_tokens=40)
        await anext(stream)
        steps = await all_of(up.client.scale(replicas=2, tensor_parallel_size=3, tensor_split=[2, 1, 1]))
        assert [step.fraction for step in steps] == [0.0, 1.0, 1.0]
        assert steps[0].doing == "from 1 to 2 replicas"
        assert operator.asked == [ShapeChange(replicas=2, tensor_parallel_size=3, tensor_split=(2.0, 1.0, 1.0))]
        fleet = await up.client.fleet()
        assert [len(replica.shards) for replica in fleet.replicas] == [1, 3]
        rest = [delta async for delta in stream]
        assert rest[-1].usage is not None
        assert rest[-1].usage.num_output_tokens == 40


async def test_what_is_left_out_stays_as_it_is(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer) as (up, operator):
        await all_of(up.client.scale(stage_layers=[4], replicas=None))
        assert operator.asked == [ShapeChange(stage_layers=(4,))]


async def test_reload_and_restart_reach_the_operator(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer) as (up, operator):
        assert (await all_of(up.client.reload("org/name")))[0].doing == "loading org/name"
        assert (await all_of(up.client.restart()))[-1] == Progress("done", 1.0)
        assert operator.asked == ["org/name", "restart"]
        assert (await up.client.generate("abc", max_tokens=3)).text == "abc"


async def test_a_stream_survives_the_end_of_its_replica_in_a_restart_and_in_a_scale_down(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer, step_time_s=0.02) as (up, _):
        for operation in (
            lambda: up.client.restart(),
            lambda: up.client.scale(replicas=2),
            lambda: up.client.scale(replicas=1),
        ):
            streams = [up.client.stream("abc", max_tokens=100) for _ in range(4)]
            texts = [(await anext(stream)).text for stream in streams]
            await all_of(operation())
            for index, stream in enumerate(streams):
                texts[index] += "".join([delta.text async for delta in stream])
            assert texts == [("abc" * 34)[:100]] * 4


async def test_of_two_operations_at_once_one_wins_and_the_other_is_aborted(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer) as (up, operator):
        operator.may_go_on.clear()
        first = up.client.scale(replicas=2)
        await anext(first)
        error = await refusal(up.client.restart())
        assert (error.code, "another operation" in str(error)) == ("ABORTED", True)
        operator.may_go_on.set()
        assert [step.doing async for step in first] == ["replica 1 serves", "done"]


async def test_what_cannot_be_done_is_refused_with_the_reason_and_touches_nothing(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer) as (up, _):
        error = await refusal(up.client.scale(replicas=9))
        assert (error.code, str(error)) == ("FAILED_PRECONDITION", "9 replicas need 9 hosts, but there are 4")
        assert len((await up.client.fleet()).replicas) == 1


async def test_a_failure_half_way_is_told_with_its_reason(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer) as (up, operator):
        operator.fails_with = "replica 0: host 10.0.0.1 pid 7 died; back on tensor 1"
        error = await refusal(up.client.restart())
        assert (error.code, str(error)) == ("INTERNAL", operator.fails_with)


async def test_an_operation_goes_on_when_its_client_leaves(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer) as (up, operator):
        operator.may_go_on.clear()
        async with AsyncClient(up.address) as leaving:
            await anext(leaving.scale(replicas=2))
        assert (await refusal(up.client.restart())).code == "ABORTED"
        operator.may_go_on.set()
        await eventually(lambda: len(up.driver.fleet.ready_replicas()) == 2)


async def test_an_operation_that_fails_after_its_client_left_is_logged(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with operated(tokenizer) as (up, operator):
        operator.may_go_on.clear()
        operator.fails_with = "no host answers"
        async with AsyncClient(up.address) as leaving:
            await anext(leaving.restart())
        operator.may_go_on.set()
        await eventually(lambda: "no host answers" in caplog.text)


async def test_a_drain_ends_when_the_requests_have(tokenizer: Tokenizer) -> None:
    async with operated(tokenizer, step_time_s=0.02) as (up, operator):
        stream = up.client.stream("abc", max_tokens=30)
        await anext(stream)
        draining = up.client.drain(timeout_s=20)
        assert (await anext(draining)).doing == "1 requests in flight"
        await eventually(lambda: up.driver.fleet.snapshot().state == "stopping")
        with pytest.raises(ServerError, match="shutting down"):
            await up.client.generate("abc")
        rest = [delta async for delta in stream]
        assert rest[-1].usage is not None
        assert rest[-1].usage.num_output_tokens == 30
        await operator.drained.wait()
        await asyncio.gather(up.server.stop(0), all_of(draining))  # the server's end leaves time for the last step
        assert operator.asked == [20.0]


@pytest.mark.parametrize(
    ("field", "request_type", "values"),
    [
        ("tensor_parallel_size", "Scale", {"tensor_parallel_size": 0}),
        ("pipeline_parallel_size", "Scale", {"pipeline_parallel_size": 2**32 - 1}),
        ("replicas", "Scale", {"replicas": 1025}),
        ("replicas", "Scale", {}),
        ("tensor_split", "Scale", {"tensor_parallel_size": 2, "tensor_split": [1, 1, 1]}),
        ("tensor_split[1]", "Scale", {"tensor_split": [1, float("nan")]}),
        ("tensor_split[0]", "Scale", {"tensor_split": [float("inf")]}),
        ("tensor_split[0]", "Scale", {"tensor_split": [-1.0]}),
        ("stage_layers[0]", "Scale", {"stage_layers": [0, 2]}),
        ("stage_layers", "Scale", {"stage_layers": [1] * 2000}),
        ("source", "Reload", {"source": ""}),
        ("source", "Reload", {"source": "a\nb"}),
        ("source", "Reload", {"source": "a" * 5000}),
        ("timeout_s", "Drain", {"timeout_s": -1.0}),
        ("timeout_s", "Drain", {"timeout_s": float("nan")}),
        ("timeout_s", "Drain", {"timeout_s": 1e9}),
    ],
)
async def test_a_bad_value_is_refused_by_name_before_the_operator_is_asked(
    tokenizer: Tokenizer, field: str, request_type: str, values: dict[str, Any]
) -> None:
    operators: list[StubOperator] = []

    def make(driver: Driver) -> StubOperator:
        operators.append(StubOperator(driver))
        return operators[0]

    async with serving(tokenizer, num_replicas=0, operator=make) as up:
        calls = {"Scale": up.client.scale, "Reload": up.client.reload, "Drain": up.client.drain}
        error = await refusal(calls[request_type](**values))
    assert (error.code, list(error.fields)) == ("INVALID_ARGUMENT", [field])
    assert operators[0].asked == []


async def test_a_value_that_no_message_holds_is_refused_by_name() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        for values in ({"replicas": -1}, {"replicas": "two"}, {"tensor_split": 2}, {"stage_layers": [1.5]}):
            with pytest.raises(ServerError) as caught:
                client.scale(**values)  # type: ignore[arg-type]
            assert (caught.value.code, list(caught.value.fields)) == ("INVALID_ARGUMENT", list(values))
        with pytest.raises(TypeError, match="known: tensor_parallel_size"):
            client.scale(replica=1)  # type: ignore[call-arg]


async def test_a_server_without_an_operator_says_so(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, num_replicas=0) as up:
        error = await refusal(up.client.restart())
        assert (error.code, "fixed fleet" in str(error)) == ("UNIMPLEMENTED", True)


async def test_the_fleet_tells_of_a_recovery_its_cause_and_the_spares(tokenizer: Tokenizer) -> None:
    place = {"rank": 1, "stage": 0, "tp_rank": 1, "host": "10.0.0.2", "pid": 77}
    failure = RankFailure(**place, kind=FailureKind.HUNG, step=12, collective="all_reduce", cause="no answer")
    async with serving(tokenizer) as up:
        assert not (await up.client.fleet()).replicas[0].HasField("last_failure")
        up.driver.fleet.set_recovering(0, "placing a host", 0.25)
        up.driver.fleet.set_failure(0, failure)
        up.driver.fleet.set_spares(1, 2)
        fleet = await up.client.fleet()
        [replica] = fleet.replicas
        assert fleet.state == replica.state == control_pb2.FLEET_STATE_RECOVERING
        assert fleet.reason == "replica 0: placing a host"
        assert (replica.num_recoveries, replica.progress) == (0, 0.25)
        told = replica.last_failure
        assert (told.stage, told.tp_rank, told.host, told.pid) == (0, 1, "10.0.0.2", 77)
        assert (told.kind, told.step, told.collective, told.cause) == ("hung", 12, "all_reduce", "no answer")
        assert told.time.seconds > 0
        assert (fleet.num_ready_spares, fleet.num_wanted_spares) == (1, 2)
        up.driver.fleet.set_ready(0, [])
        assert (await up.client.fleet()).replicas[0].num_recoveries == 1


async def test_the_fleet_names_the_operation_that_is_under_way(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as up:
        assert not (await up.client.fleet()).HasField("operation")
        progress = OperationProgress("forming replica 0 anew", 0.5)
        up.driver.fleet.set_operation(OperationStatus(OperationKind.RESTART, progress, 1_800_000_000.0))
        told = (await up.client.fleet()).operation
        assert (told.kind, told.start_time.seconds) == (control_pb2.OPERATION_KIND_RESTART, 1_800_000_000)
        assert (told.progress.doing, told.progress.fraction) == ("forming replica 0 anew", 0.5)
