"""ModelInferRequest → GenerateRequest: the prompt, the settings in either style, and what its client wants back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

from shardray.runtime.engine.request import FieldError
from shardray.runtime.server.kserve.describe import OUTPUTS
from shardray.runtime.server.kserve.sampling import as_bool, as_text, as_whole, fill_sampling
from shardray.runtime.server.kserve.tensors import read_tensors
from shardray.v1 import inference_pb2

_MAX_PARAMETERS = 64
_MAX_JSON_LEN = 1 << 17  # characters; the longest settings that are taken have less
_JSON = "sampling_parameters"
_LISTS = ("stop", "stop_words", "bad_words", "stop_token_ids")
_FLAGS = ("stream", "exclude_input_in_output", "triton_enable_empty_final_response")
_RETURNS = {f"return_{name}": name for name in OUTPUTS if name != "text_output"}
_OWN_NAMES = {"text": "text_input", "prompt": "text_input"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a ModelInferRequest asks for."""

    generation: inference_pb2.GenerateRequest
    outputs: tuple[str, ...]
    streams: bool  # a response for each delta; otherwise one for the whole output
    with_prompt: bool  # before the output, in the first text
    timeout_s: float | None  # the request's own; that of its call holds as well
    as_raw: bool  # how tensors come back

    @property
    def prompt(self) -> str:
        return self.generation.text


def read_request(request: service_pb2.ModelInferRequest) -> Asked:
    """Raises FieldError that names a parameter, an input or an output."""
    values = _values(request)
    flags = {name: as_bool(name, values.pop(name)) for name in (*_FLAGS, *_RETURNS) if name in values}
    generation = inference_pb2.GenerateRequest(text=as_text("text_input", values.pop("text_input")))
    timeout_us = as_whole("timeout", values.pop("timeout", 0), 0, 2**63 - 1)
    generation.priority = as_whole("priority", values.pop("priority", 0), 0, 2**31 - 1)
    outputs = _outputs(request, flags)
    fill_sampling(generation.sampling, values)
    if "cumulative_logprob" in outputs and not generation.sampling.HasField("logprobs"):
        generation.sampling.logprobs = 0
    return Asked(
        generation=generation,
        outputs=outputs,
        streams=flags.get("stream", False),
        with_prompt=not flags.get("exclude_input_in_output", True),
        timeout_s=timeout_us / 1e6 if timeout_us else None,
        as_raw=bool(request.raw_input_contents),
    )


def in_their_words(error: FieldError) -> FieldError:
    """A complaint about our own message as one about theirs."""
    field = error.field.removeprefix("sampling.")
    return FieldError(_OWN_NAMES.get(field, field), error.message)


def _values(request: service_pb2.ModelInferRequest) -> dict[str, Any]:
    """All that is set, by name. An input holds against the JSON of one input, and that against a parameter."""
    tensors = read_tensors(request)
    if "text_input" not in tensors:
        raise FieldError("text_input", "is missing; give the prompt as an input of this name and of datatype BYTES")
    inputs = {name: values if name in _LISTS else _only(name, values) for name, values in tensors.items()}
    parameters = dict(_parameters(request.parameters))
    settings = _from_json(inputs.pop(_JSON, parameters.pop(_JSON, "{}")))
    return {**parameters, **settings, **inputs}


def _only(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        hint = "; send a request for each prompt" if name == "text_input" else ""
        raise FieldError(name, f"has {len(values)} elements, give one{hint}")
    return values[0]


def _parameters(parameters: Mapping[str, Message]) -> Iterator[tuple[str, Any]]:
    if len(parameters) > _MAX_PARAMETERS:
        raise FieldError("parameters", f"has {len(parameters)} entries, at most {_MAX_PARAMETERS} are taken")
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        value = None if kind is None else getattr(parameter, kind)
        if name in ("sequence_id", "sequence_start", "sequence_end"):
            if name == "sequence_id" and value:
                raise FieldError("sequence_id", "sequences are not kept here; send the whole prompt with each request")
        elif name != "text_input" and value is not None:
            yield name, value


def _from_json(text: Any) -> dict[str, Any]:
    """The settings as the vLLM backend takes them; null leaves one alone."""
    if len(as_text(_JSON, text)) > _MAX_JSON_LEN:
        raise FieldError(_JSON, f"has {len(text)} characters, at most {_MAX_JSON_LEN} are taken")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise FieldError(_JSON, "is no JSON") from None
    if not isinstance(settings, dict):
        raise FieldError(_JSON, 'is no JSON object such as {"temperature": 0.7, "max_tokens": 64}')
    return {key: value for key, value in settings.items() if value is not None}


def _outputs(request: service_pb2.ModelInferRequest, flags: Mapping[str, bool]) -> tuple[str, ...]:
    """Those that are named, or the text if none is; and those that an input ``return_...`` asks for."""
    named = [output.name for output in request.outputs] or ["text_output"]
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise FieldError("outputs", f"{output.name!r} is not known here; {', '.join(OUTPUTS)} are")
        if output.parameters:
            raise FieldError("outputs", f"{output.name} comes in the message and as it is; leave its parameters out")
    wanted = {*named, *(name for flag, name in _RETURNS.items() if flags.get(flag))}
    return tuple(name for name in OUTPUTS if name in wanted)
