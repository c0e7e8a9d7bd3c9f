"""What is wrong with bytes that protobuf refuses as a whole: which text in them is not UTF-8."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool, empty_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet


def request_type(method: str) -> Descriptor:
    """Of ``/package.Service/Method``."""
    service, _, name = method.strip("/").partition("/")
    found = descriptor_pool.Default().FindServiceByName(service)
    request: Descriptor = found.methods_by_name[name].input_type
    return request


def text_that_is_no_utf8(data: bytes, message: Descriptor) -> str | None:
    """Dotted path of the first such field, ``sampling.stop`` say; None if there is none, or the rest is broken too."""
    try:
        fields: Any = UnknownFieldSet(empty_pb2.Empty.FromString(data))
    except DecodeError:
        return None
    for one in fields:
        field = message.fields_by_number.get(one.field_number)
        if field is None or not isinstance(one.data, bytes):
            continue
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(one.data):
            return str(field.name)
        if field.message_type is not None and (inner := text_that_is_no_utf8(one.data, field.message_type)) is not None:
            return f"{field.name}.{inner}"
    return None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
