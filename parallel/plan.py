"""Who owns what: the split of a decoder over tensor ranks and pipeline stages, for any counts.

No count has to divide another. Units of an axis (query heads, FFN columns, vocabulary rows) go to tensor ranks in
contiguous blocks that differ by at most one unit; layers go to stages so that the costliest stage is as cheap as it
can be. 9 query heads over 3 KV heads on 2 ranks:

    rank 0   q0 q1 q2 q3 q4        kv0 kv1
    rank 1               q5 q6 q7 q8   kv1 kv2      <- kv1 is read by both, so both hold it

Pure arithmetic: knows nothing of tensors, processes or files.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

_Penalty = Callable[[float, float], float]
INT8_GROUP = 64  # inputs of a product that are rounded to 8 bits together, where weights have 8 bits
_ALIGNMENT = 8  # rows per unit of a wide axis where it divides: 16 bytes of a two-byte type, what tensor cores want


class Axis(enum.StrEnum):
    """The axes of a layer that tensor parallelism splits."""

    HEADS = "heads"
    KV_HEADS = "kv_heads"
    FFN = "ffn"
    VOCAB = "vocab"
    EXPERTS = "experts"
    EXPERT_FFN = "expert_ffn"


class PlanError(ValueError):
    """Shard counts that this model cannot be cut into; the message says which would do."""


@dataclass(frozen=True)
class ModelSizes:
    """What the split needs to know of a model. Costs share any one unit (parameters read per token, say).

    ``ffn_group``: columns of an MLP that are best kept together, where their number allows it.
    """

    num_heads: int
    num_kv_heads: int
    vocab_size: int
    layer_costs: tuple[float, ...]
    embed_cost: float = 0.0
    head_cost: float = 0.0
    ffn_group: int = 1


@dataclass(frozen=True)
class ShardPlan:
    """The layers of each stage, and for each axis the block of each tensor rank.

    Experts are cut like any MLP, or whole ones go to ranks (``expert_parallel``).
    """

    sizes: ModelSizes
    tp_size: int
    pp_size: int
    stages: tuple[range, ...]
    weights: tuple[float, ...]  # of the tensor ranks
    heads: tuple[range, ...]
    kv_heads: tuple[range, ...]
    expert_parallel: bool = False

    def owned(self, axis: Axis, tp_rank: int, count: int) -> range:
        """Which of ``count`` units of ``axis`` a tensor rank owns (its whole-model indices)."""
        match axis:
            case Axis.HEADS:
                return self.heads[tp_rank]
            case Axis.KV_HEADS:
                return self.kv_heads[tp_rank]
            case Axis.EXPERTS if self.expert_parallel:
                return split_units(count, self.weights)[tp_rank]
            case Axis.VOCAB:
                return split_aligned(count, self.weights)[tp_rank]
            case Axis.FFN:
                return split_aligned(count, self.weights, self.sizes.ffn_group)[tp_rank]
            case Axis.EXPERT_FFN if not self.expert_parallel:
                return split_aligned(count, self.weights, self.sizes.ffn_group)[tp_rank]
        return range(count)

    @property
    def vocab(self) -> tuple[range, ...]:
        """The vocabulary rows of each tensor rank."""
        return split_aligned(self.sizes.vocab_size, self.weights)

    def kv_of_heads(self, tp_rank: int) -> tuple[int, ...]:
        """For each query head of the rank, the index of its KV head among the KV heads that the rank holds."""
        first = self.kv_heads[tp_rank].start
        return tuple(_kv_head(self.sizes, head) - first for head in self.heads[tp_rank])


def make_plan(
    sizes: ModelSizes,
    tp_size: int,
    pp_size: int,
    tensor_split: Sequence[float] | None = None,
    stage_layers: Sequence[int] | None = None,
    expert_parallel: bool = False,
) -> ShardPlan:
    """Cut a model for ``tp_size`` tensor ranks in each of ``pp_size`` stages.

    ``tensor_split`` weighs the tensor ranks (unlike GPUs); ``stage_layers`` fixes the layers of each stage.
    Raises PlanError when there are more stages than layers or an override does not fit the counts.
    """
    weights = _check_tensor_split(tensor_split, tp_size)
    heads = split_units(sizes.num_heads, weights)
    return ShardPlan(
        sizes=sizes,
        tp_size=tp_size,
        pp_size=pp_size,
        stages=_stages(sizes, pp_size, stage_layers),
        weights=tuple(weights),
        heads=heads,
        kv_heads=tuple(_kv_range(sizes, block) for block in heads),
        expert_parallel=expert_parallel,
    )


def split_units(count: int, weights: Sequence[float]) -> tuple[range, ...]:
    """``count`` units in contiguous blocks proportional to ``weights`` (largest remainders are rounded up)."""
    return _split_units(count, tuple(weights))


@functools.lru_cache(maxsize=1024)
def _split_units(count: int, weights: tuple[float, ...]) -> tuple[range, ...]:
    exact = [Fraction(weight) for weight in weights]  # no rounding, so that the blocks always add up
    total = sum(exact)
    quotas = [count * weight / total for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda rank: (shares[rank] - quotas[rank], rank))
    for rank in by_remainder[: count - sum(shares)]:
        shares[rank] += 1
    edges = [0, *itertools.accumulate(shares)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))


def split_aligned(count: int, weights: Sequence[float], group: int = 1) -> tuple[range, ...]:
    """As ``split_units``, in units of ``group``, or of 8, where the count allows it: at 8 no block ends off a 16-byte
    boundary."""
    return _split_aligned(count, tuple(weights), group)


@functools.lru_cache(maxsize=1024)
def _split_aligned(count: int, weights: tuple[float, ...], group: int) -> tuple[range, ...]:
    units = (unit for unit in (group, _ALIGNMENT) if unit > 1 and count % unit == 0 and count // unit >= len(weights))
    unit = next(units, 1)
    return tuple(range(b.start * unit, b.stop * unit) for b in _split_units(count // unit, weights))


def split_layers(costs: Sequence[float], num_stages: int) -> tuple[range, ...]:
    """Contiguous stages of at least one entry whose highest cost is minimal, and then as equal as they can be."""
    return _split_layers(tuple(costs), num_stages)


@functools.lru_cache(maxsize=256)
def _split_layers(costs: tuple[float, ...], num_stages: int) -> tuple[range, ...]:
    prefix = [0.0, *itertools.accumulate(costs)]
    cap = _lowest_cut(prefix, num_stages, penalty=max, cap=float("inf"))[0]
    edges = _lowest_cut(prefix, num_stages, penalty=lambda a, b: a + b * b, cap=cap)[1]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))


def _lowest_cut(
    prefix: Sequence[float], num_stages: int, penalty: _Penalty, cap: float
) -> tuple[float, tuple[int, ...]]:
    """Dynamic programme over (stages used, layers used): the lowest folded penalty, and the edges that give it."""
    tolerance = 1e-9 * prefix[-1]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(num_stages):
        last_stop = len(prefix) - (num_stages - stage)
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (score, edges) in best.items():
            for stop in range(start + 1, last_stop + 1):
                cost = prefix[stop] - prefix[start]
                total = penalty(score, cost)
                if cost <= cap + tolerance and (stop not in found or total < found[stop][0]):
                    found[stop] = (total, (*edges, stop))
        best = found
    return best[len(prefix) - 1]


def _stages(sizes: ModelSizes, pp_size: int, stage_layers: Sequence[int] | None) -> tuple[range, ...]:
    num_layers = len(sizes.layer_costs)
    if not 1 <= pp_size <= num_layers:
        raise PlanError(
            f"pipeline_parallel_size {pp_size}: {num_layers} layers can be cut into 1 to {num_layers} stages"
        )
    if stage_layers is None:
        costs = list(sizes.layer_costs)
        costs[0] += sizes.embed_cost
        costs[-1] += sizes.head_cost
        return split_layers(costs, pp_size)
    if len(stage_layers) != pp_size or sum(stage_layers) != num_layers or min(stage_layers) < 1:
        raise PlanError(
            f"stage_layers {list(stage_layers)}: give {pp_size} counts of at least 1 that add up to {num_layers} layers"
        )
    edges = [0, *itertools.accumulate(stage_layers)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))


def _check_tensor_split(tensor_split: Sequence[float] | None, tp_size: int) -> Sequence[float]:
    if tp_size < 1:
        raise PlanError(f"tensor_parallel_size {tp_size}: must be at least 1")
    if tensor_split is None:
        return (1.0,) * tp_size
    if len(tensor_split) != tp_size or not all(0 < weight < math.inf for weight in tensor_split):
        raise PlanError(f"tensor_split {list(tensor_split)}: give {tp_size} positive weights, one for each tensor rank")
    return tensor_split


def _kv_head(sizes: ModelSizes, head: int) -> int:
    return head * sizes.num_kv_heads // sizes.num_heads


def _kv_range(sizes: ModelSizes, heads: range) -> range:
    if not heads:
        return range(0)
    return range(_kv_head(sizes, heads[0]), _kv_head(sizes, heads[-1]) + 1)
