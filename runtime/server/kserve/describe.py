"""What a client may ask about the model beforehand: its tensors, as metadata and as a configuration of Triton."""

from __future__ import annotations

from tritonclient.grpc import model_config_pb2, service_pb2

from shardray.runtime.server.kserve.tensors import Datatype

VERSION = "1"
"""Of every model: there is one at a time, and a reload serves other weights under the same version."""
_PLATFORM = "shardray"
_ONE, _ANY = 1, -1
# Name, datatype, elements. Every setting may be given as a parameter instead, or in the JSON of sampling_parameters.
_INPUTS: tuple[tuple[str, Datatype, int], ...] = (
    ("text_input", "BYTES", _ONE),
    ("stream", "BOOL", _ONE),
    ("exclude_input_in_output", "BOOL", _ONE),
    ("sampling_parameters", "BYTES", _ONE),
    ("max_tokens", "INT32", _ONE),
    ("min_tokens", "INT32", _ONE),
    ("temperature", "FP32", _ONE),
    ("top_k", "INT32", _ONE),
    ("top_p", "FP32", _ONE),
    ("min_p", "FP32", _ONE),
    ("repetition_penalty", "FP32", _ONE),
    ("presence_penalty", "FP32", _ONE),
    ("frequency_penalty", "FP32", _ONE),
    ("seed", "UINT64", _ONE),
    ("ignore_eos", "BOOL", _ONE),
    ("stop", "BYTES", _ANY),
    ("stop_token_ids", "INT32", _ANY),
    ("num_beams", "INT32", _ONE),
    ("length_penalty", "FP32", _ONE),
    ("early_stopping", "BOOL", _ONE),
    ("json_schema", "BYTES", _ONE),
    ("regex", "BYTES", _ONE),
    ("grammar", "BYTES", _ONE),
    ("choices", "BYTES", _ANY),
)
OUTPUTS: dict[str, tuple[Datatype, int]] = {
    "text_output": ("BYTES", _ONE),
    "finish_reason": ("BYTES", _ONE),
    "num_input_tokens": ("UINT32", _ONE),
    "num_output_tokens": ("UINT32", _ONE),
    "output_ids": ("INT32", _ANY),
    "cumulative_logprob": ("FP32", _ONE),
}
"""In the order in which they come."""
_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


def metadata(model_name: str) -> service_pb2.ModelMetadataResponse:
    response = service_pb2.ModelMetadataResponse(name=model_name, versions=[VERSION], platform=_PLATFORM)
    for name, datatype, count in _INPUTS:
        response.inputs.add(name=name, datatype=datatype, shape=[count])
    for name, (datatype, count) in OUTPUTS.items():
        response.outputs.add(name=name, datatype=datatype, shape=[count])
    return response


def config(model_name: str) -> service_pb2.ModelConfigResponse:
    """With the flags that tell a load generator that one request may have many responses."""
    found = model_config_pb2.ModelConfig(name=model_name, platform=_PLATFORM, max_batch_size=0)
    found.model_transaction_policy.decoupled = True
    for name, datatype, count in _INPUTS:
        found.input.add(name=name, data_type=_config_type(datatype), dims=[count], optional=name != "text_input")
    for name, (datatype, count) in OUTPUTS.items():
        found.output.add(name=name, data_type=_config_type(datatype), dims=[count])
    return service_pb2.ModelConfigResponse(config=found)


def _config_type(datatype: Datatype) -> model_config_pb2.DataType.ValueType:
    return model_config_pb2.DataType.Value(_CONFIG_TYPES.get(datatype, f"TYPE_{datatype}"))
