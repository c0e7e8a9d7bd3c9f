"""Sampling settings as clients of Triton's backends name and pack them → shardray.v1.SamplingParameters.

A number may come as a number or as text: the sample of the vLLM backend sends `"temperature": "0.1"`. The names are
those of our own proto, which vLLM shares, and those of the TensorRT-LLM backend where it has others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from shardray.runtime.engine.request import FieldError
from shardray.v1 import common_pb2

_FIELDS = {
    field.name: field for field in common_pb2.SamplingParameters.DESCRIPTOR.fields if field.name not in ("forced",)
}
_ALIASES = {
    "random_seed": "seed", "stop_words": "stop", "min_length": "min_tokens", "end_id": "stop_token_ids",
    "beam_width": "num_beams", "len_penalty": "length_penalty",
}  # fmt: skip
_OF_BEAMS = ("length_penalty", "early_stopping")  # without effect on one beam, and sent with it nevertheless
# Known to these backends and not done here: taken if they ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "num_return_sequences": (1,), "use_beam_search": (False,),
    "bad_words": ("",), "skip_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "return_log_probs": (False,), "return_context_logits": (False,), "return_generation_logits": (False,),
    "return_perf_metrics": (False,), "num_draft_tokens": (0,),
}  # fmt: skip
_LISTS = ("stop", "stop_token_ids", "choices")
_WITHOUT_EFFECT = ("pad_id", "detokenize")
_MOST_DIGITS = 20
_MOST_UINT = {FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1, FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1}


def fill_sampling(sampling: common_pb2.SamplingParameters, given: Mapping[str, Any]) -> None:
    """Set what ``given`` has. Raises FieldError for a name that is not known or a value that does not fit."""
    for name, value in sorted(given.items(), key=lambda item: _ALIASES.get(item[0], item[0]) in _OF_BEAMS):
        target = _ALIASES.get(name, name)
        if target in _OF_BEAMS and sampling.num_beams <= 1:
            continue
        if target != name and target in given:
            raise FieldError(name, f"means the same as {target}, which is there as well; leave one out")
        if target in _FIELDS:
            _set(sampling, _FIELDS[target], name, value)
        elif name in _NOTHING:
            _check_asks_nothing(name, value)
        elif name not in _WITHOUT_EFFECT:
            known = ", ".join(sorted({*_FIELDS, *_ALIASES}))
            raise FieldError(name, f"is not known here; {known} are")


def as_whole(name: str, value: Any, least: int, most: int) -> int:
    """Raises FieldError."""
    if isinstance(value, str) and value.isdecimal() and len(value) <= _MOST_DIGITS:
        value = int(value)  # a float holds 53 of a seed's 64 bits
    number = value if type(value) is int else as_number(name, value)
    if not (least <= number <= most and number == int(number)):
        raise FieldError(name, f"{_shown(value)} is no whole number in [{least}, {most}]")
    return int(number)


def as_number(name: str, value: Any) -> float:
    """Raises FieldError."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise FieldError(name, f"{_shown(value)} is no number")


def as_bool(name: str, value: Any) -> bool:
    """Raises FieldError."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise FieldError(name, f"{_shown(value)} is neither true nor false")


def as_text(name: str, value: Any) -> str:
    """Raises FieldError."""
    if not isinstance(value, str):
        raise FieldError(name, f"{_shown(value)} is no text")
    return value


def _set(sampling: common_pb2.SamplingParameters, field: FieldDescriptor, name: str, value: Any) -> None:
    if field.name == "logit_bias":
        _set_biases(sampling, value)
    elif field.name in _LISTS:
        entries = value if isinstance(value, list) else [value]
        entries = [entry for entry in entries if entry != ""] if name == "stop_words" else entries
        getattr(sampling, field.name).extend(_converted(field, name, entry) for entry in entries)
    elif field.name == "json_schema" and isinstance(value, dict):
        sampling.json_schema = json.dumps(value)
    else:
        value = 0 if field.name == "top_k" and value == -1 else value  # vLLM's word for all
        setattr(sampling, field.name, _converted(field, name, value))


def _set_biases(sampling: common_pb2.SamplingParameters, value: Any) -> None:
    if not isinstance(value, dict):
        raise FieldError("logit_bias", f"{_shown(value)} is no object of token ids and biases")
    for token_id, bias in value.items():
        number = as_whole("logit_bias", token_id, 0, 2**32 - 1)
        sampling.logit_bias[number] = as_number(f"logit_bias[{number}]", bias)


def _converted(field: FieldDescriptor, name: str, value: Any) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return as_number(name, value)
        case FieldDescriptor.CPPTYPE_BOOL:
            return as_bool(name, value)
        case FieldDescriptor.CPPTYPE_STRING:
            return as_text(name, value)
    return as_whole(name, value, 0, _MOST_UINT[field.cpp_type])


def _check_asks_nothing(name: str, value: Any) -> None:
    allowed = _NOTHING[name]
    for entry in value if isinstance(value, list) else [value]:
        if entry not in allowed and str(entry).lower() not in [str(one).lower() for one in allowed]:
            raise FieldError(name, f"{_shown(entry)} is not done here; leave it out, or give {allowed[0]!r}")


def _shown(value: Any) -> str:
    return repr(value)[:40]
