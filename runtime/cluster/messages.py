"""Protobuf messages ↔ the engine's structs. The only place where one becomes the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from shardray.runtime.engine.request import (
    EncoderInfo,
    EngineRequest,
    EngineStats,
    FieldError,
    FinishReason,
    SamplingParams,
    ServedModel,
    TokenOutput,
)
from shardray.runtime.model.spec import Pooling, PoolingMode
from shardray.v1 import common_pb2, replica_pb2

SECRET_METADATA_KEY = "shardray-secret"  # of the call from driver to leader
DEFAULT_MAX_TOKENS = 256

_FINISH_TO_PROTO = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: common_pb2.FINISH_REASON_ABORTED,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_POOLING_MODES: dict[PoolingMode, common_pb2.PoolingMode.ValueType] = {
    "mean": common_pb2.POOLING_MODE_MEAN,
    "cls": common_pb2.POOLING_MODE_CLS,
    "last": common_pb2.POOLING_MODE_LAST,
}
_MEAN = Pooling()
_POOLING_FROM_PROTO = {number: mode for mode, number in _POOLING_MODES.items()}
_FINISH_FROM_PROTO = {number: reason for reason, number in _FINISH_TO_PROTO.items()}
# Fields that both sides name and type alike; proto3 `optional` ones among them keep the struct's default when unset.
_OPTIONAL_FIELDS = ("temperature", "top_p", "repetition_penalty", "seed", "max_tokens", "logprobs")
_PLAIN_FIELDS = ("top_k", "min_p", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos")
_STATS_FIELDS = EngineStats.__struct_fields__


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A request that the engine can never run."""

    request_id: str
    field: str
    message: str


def params_to_proto(params: SamplingParams) -> common_pb2.SamplingParameters:
    """Every field is set, so that the receiver needs no defaults."""
    proto = common_pb2.SamplingParameters(
        logit_bias=params.logit_bias, stop_token_ids=params.stop_token_ids, stop=params.stop
    )
    for name in (*_OPTIONAL_FIELDS, *_PLAIN_FIELDS):
        value = getattr(params, name)
        if value is not None:
            setattr(proto, name, value)
    if params.forced_token_ids is not None:
        proto.forced.CopyFrom(common_pb2.TokenIds(ids=params.forced_token_ids))
    return proto


def params_from_proto(
    proto: common_pb2.SamplingParameters, *, default_seed: int = 0, default_max_tokens: int = DEFAULT_MAX_TOKENS
) -> SamplingParams:
    """The struct, checked. Raises FieldError naming the field that is out of range."""
    # HasField, not truth: zero is a value here.
    given = {name: getattr(proto, name) for name in _OPTIONAL_FIELDS if proto.HasField(name)}  # type: ignore[arg-type]
    plain = {name: getattr(proto, name) for name in _PLAIN_FIELDS}
    defaults = {"seed": default_seed, "max_tokens": default_max_tokens}
    return SamplingParams(
        logit_bias=dict(proto.logit_bias),
        stop_token_ids=tuple(proto.stop_token_ids),
        stop=tuple(proto.stop),
        forced_token_ids=tuple(proto.forced.ids) if proto.HasField("forced") else None,
        **{**defaults, **plain, **given},
    )


def finish_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason.ValueType:
    return _FINISH_TO_PROTO[reason]


def logprob_to_proto(token_id: int, logprob: float) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(token_id=token_id, logprob=logprob)


def stats_to_proto(stats: EngineStats) -> common_pb2.EngineStats:
    return common_pb2.EngineStats(**{name: getattr(stats, name) for name in _STATS_FIELDS})


def stats_from_proto(proto: common_pb2.EngineStats) -> EngineStats:
    return EngineStats(**{name: getattr(proto, name) for name in _STATS_FIELDS})


def submit_command(request: EngineRequest) -> replica_pb2.ReplicaCommand:
    submit = replica_pb2.SubmitCommand(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        generated_ids=request.generated_ids,
        sampling=params_to_proto(request.params),
        priority=request.priority,
        pooling=pooling_to_proto(request.pooling),
    )
    return replica_pb2.ReplicaCommand(submit=submit)


def cancel_command(request_id: str) -> replica_pb2.ReplicaCommand:
    return replica_pb2.ReplicaCommand(cancel=replica_pb2.CancelCommand(request_id=request_id))


def request_from_submit(submit: replica_pb2.SubmitCommand) -> EngineRequest:
    """Raises FieldError naming the parameter that is out of range."""
    return EngineRequest(
        request_id=submit.request_id,
        prompt_ids=tuple(submit.prompt_ids),
        generated_ids=tuple(submit.generated_ids),
        params=params_from_proto(submit.sampling),
        priority=submit.priority,
        pooling=pooling_from_proto(submit.pooling) if submit.HasField("pooling") else None,
    )


def model_event(model: ServedModel) -> replica_pb2.ReplicaEvents:
    proto = replica_pb2.ReplicaModel(
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        num_kv_tokens=model.num_kv_tokens,
        encoder=encoder_to_proto(model.encoder),
    )
    return replica_pb2.ReplicaEvents(model=proto)


def model_from_event(events: replica_pb2.ReplicaEvents) -> ServedModel:
    model = events.model
    encoder: EncoderInfo | None = None
    if model.HasField("encoder"):
        start_ids, forced_ids = tuple(model.encoder.start_ids), tuple(model.encoder.forced_ids)
        pooling = pooling_from_proto(model.encoder.pooling) if model.encoder.HasField("pooling") else None
        encoder = EncoderInfo(model.encoder.max_prompt_len, start_ids, forced_ids, pooling)
    return ServedModel(model.vocab_size, model.max_model_len, tuple(model.eos_token_ids), model.num_kv_tokens, encoder)


def encoder_to_proto(encoder: EncoderInfo | None) -> common_pb2.EncoderModel | None:
    if encoder is None:
        return None
    return common_pb2.EncoderModel(
        max_prompt_len=encoder.max_prompt_len,
        start_ids=encoder.start_ids,
        forced_ids=encoder.forced_ids,
        pooling=pooling_to_proto(encoder.pooling),
    )


def pooling_to_proto(pooling: Pooling | None) -> common_pb2.Pooling | None:
    if pooling is None:
        return None
    return common_pb2.Pooling(mode=_POOLING_MODES[pooling.mode], normalize=pooling.normalize)


def pooling_from_proto(proto: common_pb2.Pooling, default: Pooling = _MEAN) -> Pooling:
    """Raises FieldError for a mode that is not known; what is unset is that of ``default``."""
    if proto.mode and proto.mode not in _POOLING_FROM_PROTO:
        raise FieldError("pooling.mode", f"{proto.mode} is not known; one of {', '.join(_POOLING_MODES)} is")
    mode = _POOLING_FROM_PROTO.get(proto.mode, default.mode)
    return Pooling(mode, proto.normalize if proto.HasField("normalize") else default.normalize)


def events_to_proto(
    outputs: Iterable[TokenOutput], rejections: Iterable[Rejection], stats: EngineStats | None
) -> replica_pb2.ReplicaEvents:
    """One message for all that a step brought."""
    return replica_pb2.ReplicaEvents(
        tokens=[_token_to_proto(output) for output in outputs],
        rejected=[replica_pb2.RejectedRequest(**dataclasses.asdict(rejection)) for rejection in rejections],
        stats=stats_to_proto(stats) if stats is not None else None,
    )


def outputs_from_events(events: replica_pb2.ReplicaEvents) -> list[TokenOutput]:
    return [_token_from_proto(token) for token in events.tokens]


def rejections_from_events(events: replica_pb2.ReplicaEvents) -> list[Rejection]:
    return [Rejection(rejected.request_id, rejected.field, rejected.message) for rejected in events.rejected]


def _token_to_proto(output: TokenOutput) -> replica_pb2.TokenEvent:
    return replica_pb2.TokenEvent(
        request_id=output.request_id,
        token_id=output.token_id,
        logprob=output.logprob,
        top_logprobs=[logprob_to_proto(token_id, logprob) for token_id, logprob in output.top_logprobs],
        finish_reason=_FINISH_TO_PROTO[output.finish_reason],
        error=output.error or "",
        embedding=output.embedding or b"",
    )


def _token_from_proto(token: replica_pb2.TokenEvent) -> TokenOutput:
    return TokenOutput(
        request_id=token.request_id,
        token_id=token.token_id if token.HasField("token_id") else None,
        logprob=token.logprob if token.HasField("logprob") else None,
        top_logprobs=tuple((entry.token_id, entry.logprob) for entry in token.top_logprobs),
        finish_reason=_FINISH_FROM_PROTO[token.finish_reason],
        error=token.error or None,
        embedding=token.embedding or None,
    )
