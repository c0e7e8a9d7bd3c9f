"""Response messages → Python values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from shardray.runtime.engine.request import FinishReason
from shardray.v1 import common_pb2, inference_pb2

_FINISH_REASONS = {common_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}"): reason for reason in FinishReason}


@dataclasses.dataclass
class Delta:
    """What came since the last delta. The last one has finish_reason, usage and timing; the first one has the seed."""

    request_id: str
    text: str  # may lag behind token_ids
    token_ids: list[int]
    logprobs: list[inference_pb2.TokenLogprobs]  # one for each token id, if asked for
    finish_reason: FinishReason | None
    usage: inference_pb2.Usage | None
    timing: inference_pb2.Timing | None
    seed: int | None


@dataclasses.dataclass
class Completion:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[inference_pb2.TokenLogprobs]
    finish_reason: FinishReason
    usage: inference_pb2.Usage
    timing: inference_pb2.Timing
    seed: int


def to_embeddings(response: inference_pb2.EmbedResponse) -> list[list[float]]:
    return [list(embedding.values) for embedding in response.embeddings]


def to_delta(response: inference_pb2.GenerateResponse) -> Delta:
    return Delta(
        request_id=response.request_id,
        text=response.text,
        token_ids=list(response.token_ids),
        logprobs=list(response.logprobs),
        finish_reason=_FINISH_REASONS.get(response.finish_reason),
        usage=response.usage if response.HasField("usage") else None,
        timing=response.timing if response.HasField("timing") else None,
        seed=response.seed if response.HasField("seed") else None,
    )


def join(deltas: Iterable[Delta]) -> Completion:
    """The answer that a complete stream of deltas makes up."""
    parts = list(deltas)
    first, last = parts[0], parts[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    assert last.timing is not None
    return Completion(
        request_id=first.request_id,
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=[entry for part in parts for entry in part.logprobs],
        finish_reason=last.finish_reason,
        usage=last.usage,
        timing=last.timing,
        seed=first.seed or 0,
    )
