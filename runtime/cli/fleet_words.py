"""What a fleet is and does, in words: for its description and for its live picture."""

from __future__ import annotations

from datetime import UTC

from shardray.runtime.cli.json_messages import enum_word
from shardray.v1 import control_pb2


def state_word(message: control_pb2.Fleet | control_pb2.Replica) -> str:
    """``ready``, say."""
    return enum_word(control_pb2.FleetState.DESCRIPTOR, message.state)


def operation_line(operation: control_pb2.Operation) -> str:
    """What is being done to the fleet, since when, and how far it is."""
    kind = enum_word(control_pb2.OperationKind.DESCRIPTOR, operation.kind)
    since = operation.start_time.ToDatetime(UTC).astimezone()
    return f"{kind} since {since:%H:%M:%S}: {operation.progress.doing} {operation.progress.fraction:.0%}"


def recovery_line(replica: control_pb2.Replica) -> str:
    """How often it was formed again, and what last made that necessary; empty if nothing did."""
    count = replica.num_recoveries
    parts = [f"{count} recovery" if count == 1 else f"{count} recoveries"] if count else []
    if replica.HasField("last_failure"):
        time = replica.last_failure.time.ToDatetime(UTC).astimezone()
        parts.append(f"last failure {time:%Y-%m-%d %H:%M:%S}: {describe_failure(replica.last_failure)}")
    return "; ".join(parts)


def describe_failure(failure: control_pb2.Failure) -> str:
    """Who failed, how, where and why, in one line."""
    where = ""
    if failure.HasField("stage"):
        where = f"stage {failure.stage} tensor rank {failure.tp_rank} (host {failure.host} pid {failure.pid})"
    words = [where, failure.kind]
    if failure.HasField("step"):
        words.append(f"at step {failure.step}")
    if failure.collective and failure.collective not in failure.cause:
        words.append(f"in {failure.collective}")
    event = " ".join(word for word in words if word)
    return f"{event}: {failure.cause}" if event else failure.cause
