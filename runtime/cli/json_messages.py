"""Protobuf messages as plain JSON: 64-bit numbers stay numbers, enums are lower-case words, times are ISO 8601."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp


def to_jsonable(message: Message) -> Any:
    """Every field by its name in the .proto file; an optional field that is not set is left out."""
    if isinstance(message, Timestamp):
        return message.ToJsonString()
    fields = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        fields[field.name] = [_plain(field, item) for item in value] if field.is_repeated else _plain(field, value)
    return fields


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """``FLEET_STATE_READY`` of the enum FleetState → ``ready``."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return enum.values_by_number[number].name.removeprefix(prefix).lower()


def _plain(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return to_jsonable(value)
    return enum_word(field.enum_type, value) if field.enum_type is not None else value
