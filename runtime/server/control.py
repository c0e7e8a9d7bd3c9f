"""shardray.v1.ControlService over the driver's fleet and the operator that changes it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import msgspec

from shardray.runtime.cluster.reports import RankFailure
from shardray.runtime.driver.fleet import Fleet, FleetStatus, ReplicaStatus
from shardray.runtime.driver.operations import FleetOperator, OperationProgress, OperationStatus
from shardray.runtime.engine.assignment import ShardInfo, ShardLoad
from shardray.runtime.engine.request import FieldError
from shardray.runtime.server.messages import stats_to_proto
from shardray.runtime.server.operations import check_drain_timeout, check_scale, check_source
from shardray.runtime.server.traces import check_seconds, trace_to_proto
from shardray.v1 import control_pb2, control_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
_DEFAULT_INTERVAL_MS = 500
_MAX_INTERVAL_MS = 60_000
_NO_OPERATOR = "this server has a fixed fleet: it was started without an operator"


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Available in every state of the fleet. Without an operator the fleet can only be looked at."""

    def __init__(self, fleet: Fleet, operator: FleetOperator | None = None) -> None:
        self._fleet = fleet
        self._operator = operator

    async def GetFleet(self, request: control_pb2.GetFleetRequest, context: _Context) -> control_pb2.GetFleetResponse:
        return control_pb2.GetFleetResponse(fleet=fleet_to_proto(self._fleet.snapshot()))

    async def WatchFleet(
        self, request: control_pb2.WatchFleetRequest, context: _Context
    ) -> AsyncIterator[control_pb2.WatchFleetResponse]:
        interval_ms = request.min_interval_ms or _DEFAULT_INTERVAL_MS
        if interval_ms > _MAX_INTERVAL_MS:
            raise FieldError("min_interval_ms", f"{interval_ms} is outside [0, {_MAX_INTERVAL_MS}]")
        async for status in self._fleet.watch(interval_ms / 1000):
            yield control_pb2.WatchFleetResponse(fleet=fleet_to_proto(status))

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ScaleResponse]:
        change = check_scale(request)
        operator = await self._require_operator(context)
        async for step in operator.scale(change):
            yield control_pb2.ScaleResponse(progress=_progress_to_proto(step))

    async def Reload(
        self, request: control_pb2.ReloadRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ReloadResponse]:
        source = check_source(request.source)
        operator = await self._require_operator(context)
        async for step in operator.reload(source):
            yield control_pb2.ReloadResponse(progress=_progress_to_proto(step))

    async def Restart(
        self, request: control_pb2.RestartRequest, context: _Context
    ) -> AsyncIterator[control_pb2.RestartResponse]:
        operator = await self._require_operator(context)
        async for step in operator.restart():
            yield control_pb2.RestartResponse(progress=_progress_to_proto(step))

    async def Drain(
        self, request: control_pb2.DrainRequest, context: _Context
    ) -> AsyncIterator[control_pb2.DrainResponse]:
        timeout_s = check_drain_timeout(request)
        operator = await self._require_operator(context)
        async for step in operator.drain(timeout_s):
            yield control_pb2.DrainResponse(progress=_progress_to_proto(step))

    async def Trace(
        self, request: control_pb2.TraceRequest, context: _Context
    ) -> AsyncIterator[control_pb2.TraceResponse]:
        seconds = check_seconds(request.seconds)
        operator = await self._require_operator(context)
        for trace in await operator.trace(seconds):
            for part in trace_to_proto(trace):
                yield control_pb2.TraceResponse(trace=part)

    async def _require_operator(self, context: _Context) -> FleetOperator:
        if self._operator is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, _NO_OPERATOR)
        assert self._operator is not None  # abort raises
        return self._operator


def fleet_to_proto(status: FleetStatus) -> control_pb2.Fleet:
    fleet = control_pb2.Fleet(
        model_id=status.model_id,
        state=control_pb2.FleetState.Value(f"FLEET_STATE_{status.state.name}"),
        reason=status.reason,
        replicas=[_replica_to_proto(replica) for replica in status.replicas],
        num_queued_requests=status.num_queued_requests,
        num_live_requests=status.num_live_requests,
        num_ready_spares=status.num_ready_spares,
        num_wanted_spares=status.num_wanted_spares,
        operation=None if status.operation is None else _operation_to_proto(status.operation),
    )
    fleet.start_time.FromMilliseconds(round(status.start_time_s * 1000))
    return fleet


def _progress_to_proto(progress: OperationProgress) -> control_pb2.OperationProgress:
    return control_pb2.OperationProgress(doing=progress.doing, fraction=progress.fraction)


def _operation_to_proto(operation: OperationStatus) -> control_pb2.Operation:
    kind = control_pb2.OperationKind.Value(f"OPERATION_KIND_{operation.kind.name}")
    message = control_pb2.Operation(kind=kind, progress=_progress_to_proto(operation.progress))
    message.start_time.FromMilliseconds(round(operation.start_time_s * 1000))
    return message


def _replica_to_proto(replica: ReplicaStatus) -> control_pb2.Replica:
    message = control_pb2.Replica(
        replica_id=replica.replica_id,
        state=control_pb2.FleetState.Value(f"FLEET_STATE_{replica.state.name}"),
        reason=replica.reason,
        progress=replica.progress,
        shards=[_shard_to_proto(shard, replica.load_of(shard)) for shard in replica.shards],
        stats=stats_to_proto(replica.stats),
        num_live_requests=replica.num_live_requests,
        output_tokens_per_s=replica.output_tokens_per_s,
        num_recoveries=replica.num_recoveries,
        last_failure=_failure_to_proto(replica.last_failure, replica.last_failure_s),
    )
    message.state_time.FromMilliseconds(round(replica.state_time_s * 1000))
    return message


def _shard_to_proto(shard: ShardInfo, load: ShardLoad | None) -> control_pb2.Shard:
    """The messages have the structs' fields, by the same names."""
    told = None if load is None else control_pb2.ShardLoad(**msgspec.structs.asdict(load))
    return control_pb2.Shard(**msgspec.structs.asdict(shard), load=told)


def _failure_to_proto(failure: RankFailure | None, time_s: float) -> control_pb2.Failure | None:
    if failure is None:
        return None
    message = control_pb2.Failure(
        stage=failure.stage,
        tp_rank=failure.tp_rank,
        host=failure.host,
        pid=failure.pid,
        kind=failure.kind,
        step=failure.step,
        collective=failure.collective or "",
        cause=failure.cause,
    )
    message.time.FromMilliseconds(round(time_s * 1000))
    return message
