"""Public protobuf messages ↔ the engine's structs. The only place where one becomes the other."""

from __future__ import annotations

from shardray.runtime.engine.request import (
    EncoderInfo,
    EngineStats,
    FieldError,
    FinishReason,
    SamplingParams,
)
from shardray.runtime.model.spec import Pooling, PoolingMode
from shardray.v1 import common_pb2

DEFAULT_MAX_TOKENS = 256

_POOLING_MODES: dict[PoolingMode, common_pb2.PoolingMode.ValueType] = {
    "mean": common_pb2.POOLING_MODE_MEAN,
    "cls": common_pb2.POOLING_MODE_CLS,
    "last": common_pb2.POOLING_MODE_LAST,
}
_MEAN = Pooling()
_POOLING_FROM_PROTO = {number: mode for mode, number in _POOLING_MODES.items()}
# Fields that both sides name and type alike; proto3 `optional` ones among them keep the struct's default when unset.
_OPTIONAL_FIELDS = (
    "temperature",
    "top_p",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "logprobs",
    "num_beams",
    "length_penalty",
    "json_schema",
    "regex",
    "grammar",
)
_PLAIN_FIELDS = (
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
    "early_stopping",
)
_STATS_FIELDS = EngineStats.__struct_fields__


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
        choices=tuple(proto.choices),
        forced_token_ids=tuple(proto.forced.ids) if proto.HasField("forced") else None,
        **{**defaults, **plain, **given},
    )


def finish_to_proto(reason: FinishReason) -> common_pb2.FinishReason.ValueType:
    return common_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}")


def logprob_to_proto(token_id: int, logprob: float) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(token_id=token_id, logprob=logprob)


def stats_to_proto(stats: EngineStats) -> common_pb2.EngineStats:
    return common_pb2.EngineStats(**{name: getattr(stats, name) for name in _STATS_FIELDS})


def stats_from_proto(proto: common_pb2.EngineStats) -> EngineStats:
    return EngineStats(**{name: getattr(proto, name) for name in _STATS_FIELDS})


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
