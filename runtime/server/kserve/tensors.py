"""Tensors of the open inference protocol ↔ lists of Python values.

A client packs a tensor into the typed fields of its message, or into ``raw_input_contents``: little-endian numbers,
texts each behind its length in four bytes. It is answered the way it asked.
https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from tritonclient.grpc import service_pb2

from shardray.runtime.engine.request import FieldError
from shardray.runtime.server.numbers import as_written

Datatype = Literal["BYTES", "BOOL", "UINT32", "UINT64", "INT32", "FP32"]

_TEXT = "BYTES"
_NUMPY_TYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
_LEN_BYTES = 4
# Longer than any list that a request has; reading more would hold up the other streams.
_MAX_ELEMENTS = 1024
_MAX_INPUTS = 64
_InputTensor: TypeAlias = Any  # the stubs have no types


def read_tensors(request: service_pb2.ModelInferRequest) -> dict[str, list[Any]]:
    """The values of each input, whatever its shape; texts as str. Raises FieldError."""
    raws = request.raw_input_contents
    if len(request.inputs) > _MAX_INPUTS:
        raise FieldError("inputs", f"has {len(request.inputs)} entries, at most {_MAX_INPUTS} are taken")
    if raws and len(raws) != len(request.inputs):
        raise FieldError(
            "raw_input_contents", f"has {len(raws)} entries for {len(request.inputs)} inputs; give one each"
        )
    found: dict[str, list[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in found:
            raise FieldError(tensor.name, "is there twice; give each input once")
        if "shared_memory_region" in tensor.parameters:
            raise FieldError(tensor.name, "lies in shared memory, which is not read here; send it in the message")
        found[tensor.name] = _from_raw(tensor, raws[index]) if raws else _from_contents(tensor)
    return found


def add_output(
    response: service_pb2.ModelInferResponse, name: str, datatype: Datatype, values: Sequence[Any], as_raw: bool
) -> None:
    """Append a tensor of one dimension."""
    tensor = response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    if datatype == _TEXT:
        values = [text.encode("utf-8") for text in values]
    if not as_raw:
        getattr(tensor.contents, _CONTENTS[datatype]).extend(values)
    elif datatype == _TEXT:
        raw = b"".join(len(data).to_bytes(_LEN_BYTES, "little") + data for data in values)
        response.raw_output_contents.append(raw)
    else:
        response.raw_output_contents.append(np.array(values, dtype=_NUMPY_TYPES[datatype]).tobytes())


def _from_contents(tensor: _InputTensor) -> list[Any]:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise FieldError(tensor.name, f"datatype {tensor.datatype!r} is not known here; {', '.join(_CONTENTS)} are")
    contents = getattr(tensor.contents, field)
    _check_count(tensor, len(contents))
    match tensor.datatype:
        case "BYTES":
            return [_text(tensor.name, data) for data in contents]
        case "FP32":
            return [as_written(value) for value in np.array(contents, dtype=np.float32)]
    return list(contents)


def _from_raw(tensor: _InputTensor, raw: bytes) -> list[Any]:
    if tensor.datatype == _TEXT:
        texts = list(itertools.islice(_split(tensor.name, raw), _MAX_ELEMENTS + 1))
        _check_count(tensor, len(texts))
        return [_text(tensor.name, data) for data in texts]
    if (kind := _NUMPY_TYPES.get(tensor.datatype)) is None:
        known = ", ".join([_TEXT, *_NUMPY_TYPES])
        raise FieldError(tensor.name, f"datatype {tensor.datatype!r} is not known here; {known} are")
    num_values, num_left = divmod(len(raw), np.dtype(kind).itemsize)
    if num_left:
        raise FieldError(tensor.name, f"has {len(raw)} bytes, no whole number of {tensor.datatype}")
    _check_count(tensor, num_values)
    values = np.frombuffer(raw, dtype=kind)
    return [as_written(value) for value in values] if tensor.datatype in ("FP16", "FP32") else list(values.tolist())


def _check_count(tensor: _InputTensor, num_values: int) -> None:
    if num_values > _MAX_ELEMENTS:
        raise FieldError(tensor.name, f"has more than {_MAX_ELEMENTS} elements, the most that are taken")
    if num_values != math.prod(tensor.shape):
        message = f"has {num_values} elements, and its shape {list(tensor.shape)} says otherwise"
        raise FieldError(tensor.name, message)


def _split(name: str, raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        begin = at + _LEN_BYTES
        at = begin + int.from_bytes(raw[at:begin], "little")
        if begin > len(raw) or at > len(raw):
            raise FieldError(name, "its bytes end within an element; each is its length in 4 bytes, and then itself")
        yield raw[begin:at]


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FieldError(name, "is not UTF-8") from None
