"""shardray.v1.ControlService over the driver's fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import msgspec

from shardray.runtime.cluster.messages import stats_to_proto
from shardray.runtime.driver.fleet import Fleet, FleetState, FleetStatus, ReplicaStatus
from shardray.runtime.engine.request import FieldError
from shardray.v1 import control_pb2, control_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
_DEFAULT_INTERVAL_MS = 500
_MAX_INTERVAL_MS = 60_000
_STATES = {
    FleetState.LOADING: control_pb2.FLEET_STATE_LOADING,
    FleetState.READY: control_pb2.FLEET_STATE_READY,
    FleetState.FAILED: control_pb2.FLEET_STATE_FAILED,
    FleetState.STOPPING: control_pb2.FLEET_STATE_STOPPING,
}


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Available in every state of the fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

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


def fleet_to_proto(status: FleetStatus) -> control_pb2.Fleet:
    fleet = control_pb2.Fleet(
        model_id=status.model_id,
        state=_STATES[status.state],
        reason=status.reason,
        replicas=[_replica_to_proto(replica) for replica in status.replicas],
        num_queued_requests=status.num_queued_requests,
        num_live_requests=status.num_live_requests,
    )
    fleet.start_time.FromMilliseconds(round(status.start_time_s * 1000))
    return fleet


def _replica_to_proto(replica: ReplicaStatus) -> control_pb2.Replica:
    message = control_pb2.Replica(
        replica_id=replica.replica_id,
        state=_STATES[replica.state],
        reason=replica.reason,
        progress=replica.progress,
        # The message has the struct's fields, by the same names.
        shards=[control_pb2.Shard(**msgspec.structs.asdict(shard)) for shard in replica.shards],
        stats=stats_to_proto(replica.stats),
        num_live_requests=replica.num_live_requests,
        output_tokens_per_s=replica.output_tokens_per_s,
    )
    message.state_time.FromMilliseconds(round(replica.state_time_s * 1000))
    return message
