"""The shard plan: every unit has one owner, shares are even, query heads find their KV heads, stages are balanced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.parallel.plan import (
    Axis,
    ModelSizes,
    PlanError,
    ShardPlan,
    make_plan,
    split_aligned,
    split_layers,
    split_units,
)

weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


@st.composite
def model_sizes(draw: st.DrawFn) -> ModelSizes:
    num_kv_heads = draw(st.integers(1, 12))
    return ModelSizes(
        num_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        vocab_size=draw(st.integers(1, 1000)),
        layer_costs=tuple(draw(st.lists(st.floats(0.5, 100.0), min_size=1, max_size=12))),
        embed_cost=draw(st.floats(0, 50)),
        head_cost=draw(st.floats(0, 500)),
    )


@st.composite
def plans(draw: st.DrawFn) -> ShardPlan:
    sizes = draw(model_sizes())
    tp_size = draw(st.integers(1, 9))
    split = draw(st.none() | st.lists(st.floats(0.1, 10), min_size=tp_size, max_size=tp_size))
    return make_plan(sizes, tp_size, draw(st.integers(1, len(sizes.layer_costs))), split)


def check_partition(blocks: Sequence[range], count: int) -> None:
    """Contiguous, in order, without gap or overlap."""
    assert list(itertools.chain(*blocks)) == list(range(count))


@given(plan=plans())
def test_every_unit_of_every_axis_has_exactly_one_owner(plan: ShardPlan) -> None:
    sizes = plan.sizes
    for axis, count in (
        (Axis.HEADS, sizes.num_heads),
        (Axis.FFN, 344),
        (Axis.VOCAB, sizes.vocab_size),
    ):
        check_partition([plan.owned(axis, tp_rank, count) for tp_rank in range(plan.tp_size)], count)


@given(plan=plans())
def test_every_layer_is_in_one_stage_and_no_stage_is_empty(plan: ShardPlan) -> None:
    check_partition(plan.stages, len(plan.sizes.layer_costs))
    assert len(plan.stages) == plan.pp_size
    assert all(plan.stages)


@given(plan=plans())
def test_each_query_head_finds_its_kv_head_on_its_rank(plan: ShardPlan) -> None:
    group = plan.sizes.num_heads // plan.sizes.num_kv_heads
    for tp_rank in range(plan.tp_size):
        held = list(plan.kv_heads[tp_rank])
        found = [held[local] for local in plan.kv_of_heads(tp_rank)]
        assert found == [head // group for head in plan.heads[tp_rank]]
        assert set(found) == set(held)  # none is held in vain
        assert held == list(range(held[0], held[0] + len(held))) if held else True


@given(plan=plans())
def test_every_kv_head_is_held_somewhere_and_blocks_overlap_by_one_at_most(plan: ShardPlan) -> None:
    blocks = [block for block in plan.kv_heads if block]
    assert set(itertools.chain(*blocks)) == set(range(plan.sizes.num_kv_heads))
    for left, right in itertools.pairwise(blocks):
        assert right.start in (left.stop - 1, left.stop)


@given(sizes=model_sizes(), tp_size=st.integers(1, 9))
def test_equal_ranks_differ_by_one_unit_at_most(sizes: ModelSizes, tp_size: int) -> None:
    plan = make_plan(sizes, tp_size, 1)
    for blocks, count in ((plan.heads, sizes.num_heads), (plan.vocab, sizes.vocab_size)):
        aligned = blocks is not plan.heads and count % 8 == 0 and count // 8 >= tp_size
        unit = 8 if aligned else 1
        lengths = [len(block) for block in blocks]
        assert max(lengths) - min(lengths) <= unit
        assert all(length % unit == 0 for length in lengths)


@given(count=st.integers(0, 2000), split=weights)
def test_shares_are_the_quotas_rounded_by_largest_remainder(count: int, split: list[float]) -> None:
    blocks = split_units(count, split)
    check_partition(blocks, count)
    total = sum(map(Fraction, split))
    quotas = [count * Fraction(weight) / total for weight in split]
    rounded_up = [len(block) - math.floor(quota) for block, quota in zip(blocks, quotas, strict=True)]
    assert set(rounded_up) <= {0, 1}
    remainders = [quota - math.floor(quota) for quota in quotas]
    ups = [r for r, up in zip(remainders, rounded_up, strict=True) if up]
    downs = [r for r, up in zip(remainders, rounded_up, strict=True) if not up]
    assert min(ups, default=Fraction(1)) >= max(downs, default=Fraction(0))


@given(count=st.integers(1, 500), split=st.lists(st.floats(5e-324, 1.7e308), min_size=1, max_size=6))
def test_no_unit_is_lost_to_rounding_whatever_the_weights(count: int, split: list[float]) -> None:
    check_partition(split_units(count, split), count)


@given(count=st.integers(1, 500), split=weights)
def test_wide_axes_are_cut_at_multiples_of_eight_where_they_can_be(count: int, split: list[float]) -> None:
    blocks = split_aligned(8 * count, split)
    check_partition(blocks, 8 * count)
    if count >= len(split):
        assert all(block.start % 8 == 0 for block in blocks)


def test_the_example_of_nine_heads_on_two_ranks() -> None:
    plan = make_plan(ModelSizes(9, 3, 49_152, (1.0,)), 2, 1)
    assert plan.heads == (range(5), range(5, 9))
    assert plan.kv_heads == (range(2), range(1, 3))
    assert plan.kv_of_heads(0) == (0, 0, 0, 1, 1)
    assert plan.kv_of_heads(1) == (0, 1, 1, 1)


def test_tensor_split_weighs_unlike_ranks() -> None:
    plan = make_plan(ModelSizes(32, 8, 1600, (1.0,)), 3, 1, tensor_split=(2, 1, 1))
    assert [len(block) for block in plan.heads] == [16, 8, 8]
    assert [len(plan.owned(Axis.FFN, tp_rank, 800)) for tp_rank in range(3)] == [400, 200, 200]
    assert [len(block) for block in plan.vocab] == [800, 400, 400]


def test_more_ranks_than_heads_leave_some_without_heads() -> None:
    plan = make_plan(ModelSizes(3, 1, 11, (1.0,)), 5, 1)
    assert [len(block) for block in plan.heads] == [1, 1, 1, 0, 0]
    assert [len(block) for block in plan.kv_heads] == [1, 1, 1, 0, 0]
    assert plan.kv_of_heads(4) == ()


def brute_force(costs: Sequence[float], num_stages: int) -> float:
    """The lowest cost that the costliest stage can have."""
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    edges = ([0, *cut, len(costs)] for cut in cuts)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise(edge)) for edge in edges)


@given(
    costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=8),
    num_stages=st.integers(1, 8),
)
def test_the_costliest_stage_is_as_cheap_as_it_can_be(costs: list[float], num_stages: int) -> None:
    num_stages = min(num_stages, len(costs))
    stages = split_layers(costs, num_stages)
    check_partition(stages, len(costs))
    costliest = max(sum(costs[layer] for layer in stage) for stage in stages)
    assert costliest == pytest.approx(brute_force(costs, num_stages), rel=1e-9)


@given(num_layers=st.integers(1, 60), num_stages=st.integers(1, 12))
@settings(max_examples=40)
def test_like_layers_are_dealt_out_evenly(num_layers: int, num_stages: int) -> None:
    num_stages = min(num_stages, num_layers)
    lengths = [len(stage) for stage in split_layers([1.0] * num_layers, num_stages)]
    assert max(lengths) - min(lengths) <= 1


def test_the_stage_with_a_heavy_head_gets_fewer_layers() -> None:
    sizes = ModelSizes(4, 4, 64, (1.0,) * 12, head_cost=4.0)
    assert [len(stage) for stage in make_plan(sizes, 1, 2).stages] == [8, 4]


def test_a_deep_model_is_cut_into_many_stages_in_no_time() -> None:
    plan = make_plan(ModelSizes(8, 8, 64, (1.0,) * 126, head_cost=3.0), 1, 64)
    assert len(plan.stages) == 64


def test_stage_layers_are_honoured() -> None:
    plan = make_plan(ModelSizes(4, 4, 64, (1.0,) * 22), 1, 2, stage_layers=(10, 12))
    assert plan.stages == (range(10), range(10, 22))


SIZES = ModelSizes(4, 2, 64, (1.0,) * 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp_size": 0}, "tensor_parallel_size 0: must be at least 1"),
        ({"pp_size": 0}, "pipeline_parallel_size 0: 6 layers can be cut into 1 to 6 stages"),
        ({"pp_size": 7}, "pipeline_parallel_size 7: 6 layers can be cut into 1 to 6 stages"),
        ({"tp_size": 2, "tensor_split": (1.0,)}, "tensor_split [1.0]: give 2 positive weights"),
        ({"tensor_split": ()}, "tensor_split []: give 1 positive weights"),
        ({"tp_size": 2, "tensor_split": (1.0, 0.0)}, "tensor_split [1.0, 0.0]: give 2 positive weights"),
        ({"tp_size": 2, "tensor_split": (1.0, math.nan)}, "tensor_split [1.0, nan]: give 2 positive weights"),
        ({"tp_size": 2, "tensor_split": (1.0, math.inf)}, "tensor_split [1.0, inf]: give 2 positive weights"),
        ({"pp_size": 2, "stage_layers": (6,)}, "stage_layers [6]: give 2 counts of at least 1 that add up to 6"),
        ({"pp_size": 2, "stage_layers": (6, 0)}, "stage_layers [6, 0]: give 2 counts of at least 1"),
        ({"pp_size": 2, "stage_layers": (3, 4)}, "stage_layers [3, 4]: give 2 counts"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_those_that_would(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(SIZES, **({"tp_size": 1, "pp_size": 1} | arguments))  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
