"""Requests as Triton's clients make them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferResult

_TYPES = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}


def tensor(name: str, datatype: str, *values: Any) -> InferInput:
    one = InferInput(name, [len(values)], datatype)
    data = [value.encode() if isinstance(value, str) else value for value in values]
    one.set_data_from_numpy(np.array(data, dtype=_TYPES[datatype]))
    return one


def text_of(result: InferResult) -> str:
    return str(result.as_numpy("text_output")[0].decode())


def is_final(result: InferResult) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)
