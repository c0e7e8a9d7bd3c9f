"""FLOPs, bytes and messages of a step, held against counting by hand and against the same model uncut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.parallel.plan import make_plan
from shardray.runtime.model.costs import StepLoad, Traffic, ring_sum, seen_tokens, share_of_experts, step_cost
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.parameters import model_sizes
from shardray.runtime.model.spec import Attention, DecoderSpec, Experts, Mlp
from tests.model.zoo import save
from tests.tiny_models import LLAMA, save_llama


def attention_of(causal: bool, window: int | None) -> Attention:
    return Attention(num_heads=1, num_kv_heads=1, head_dim=4, scale=1.0, causal=causal, window=window)


@given(window=st.none() | st.integers(1, 9), num_new=st.integers(1, 12), context_len=st.integers(0, 12))
def test_tokens_that_are_seen_are_counted_right(window: int | None, num_new: int, context_len: int) -> None:
    by_hand = sum(min(position + 1, window or 10**6) for position in range(context_len, context_len + num_new))
    assert seen_tokens(attention_of(True, window), num_new, context_len) == by_hand


@given(window=st.none() | st.integers(1, 9), num_new=st.integers(1, 12))
def test_an_encoder_s_token_sees_to_both_sides(window: int | None, num_new: int) -> None:
    most = num_new if window is None else min(num_new, 2 * window - 1)
    assert seen_tokens(attention_of(False, window), num_new, 0) == num_new * most


def test_experts_that_tokens_meet() -> None:
    experts = Experts(8, 2, Mlp(4, "silu", True), True)
    assert share_of_experts(experts, 1) == pytest.approx(2 / 8)
    assert share_of_experts(experts, 2) == pytest.approx(2 / 8 + (6 / 8) * 2 / 8)
    assert share_of_experts(experts, 10_000) == pytest.approx(1.0)


def test_a_ring_sends_the_whole_tensor_nearly_twice() -> None:
    assert ring_sum(1, 1000) == Traffic(0, 0)
    assert ring_sum(2, 1000) == Traffic(2, 1000)
    assert ring_sum(4, 1000) == Traffic(6, 1500)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    return read_model_config(save_llama(tmp_path_factory.mktemp("llama")))[1]


def cost_of(spec: DecoderSpec, tp_size: int, pp_size: int, load: StepLoad) -> tuple[float, float, float]:
    """(FLOPs, bytes of products, bytes of attention) over all ranks"""
    plan = make_plan(model_sizes(spec), tp_size, pp_size)
    costs = [step_cost(spec, plan, stage, rank, load, 2) for stage in range(pp_size) for rank in range(tp_size)]
    weight_bytes = sum(cost.products.num_bytes + cost.head.num_bytes for cost in costs)
    return sum(cost.work.flops for cost in costs), weight_bytes, sum(cost.attention.num_bytes for cost in costs)


def test_a_decode_step_by_hand(llama: DecoderSpec) -> None:
    hidden, heads, kv_heads, dim, ffn = 72, 9, 3, 16, 104
    layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * ffn
    matrices = LLAMA["num_hidden_layers"] * layer + LLAMA["vocab_size"] * hidden
    flops, weight_bytes, kv_bytes = cost_of(llama, 1, 1, StepLoad(num_seqs=4, num_new=1, context_len=99))
    assert flops == 2 * matrices * 4 + 5 * 4 * dim * heads * 4 * 100
    assert weight_bytes == 2 * matrices
    assert kv_bytes == 5 * 2 * kv_heads * dim * 2 * 4 * 100


def test_what_products_make_is_written_and_read(llama: DecoderSpec) -> None:
    hidden, heads, kv_heads, dim, ffn = 72, 9, 3, 16, 104
    made = dim * (heads + 2 * kv_heads) + hidden + 2 * ffn + hidden
    plan = make_plan(model_sizes(llama), 1, 1)
    cost = step_cost(llama, plan, 0, 0, StepLoad(num_seqs=4, num_new=1, context_len=99), 2)
    assert cost.activation_bytes == LLAMA["num_hidden_layers"] * 2 * 2 * 4 * made
    assert cost.work.num_bytes - cost.activation_bytes == sum(
        part.num_bytes for part in (cost.products, cost.head, cost.attention)
    )


def test_a_prompt_s_one_token_of_the_head_is_no_part_of_its_products(llama: DecoderSpec) -> None:
    plan = make_plan(model_sizes(llama), 1, 1)
    cost = step_cost(llama, plan, 0, 0, StepLoad(1, 64, 0), 2)
    assert cost.head.flops == cost.head.num_bytes == 2 * LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert cost.products.flops == 64 * cost.products.num_bytes


def test_logits_are_made_for_the_last_token_of_a_prompt_alone(llama: DecoderSpec) -> None:
    whole = cost_of(llama, 1, 1, StepLoad(1, 64, 0))[0]
    by_parts = cost_of(llama, 1, 1, StepLoad(1, 32, 0))[0] + cost_of(llama, 1, 1, StepLoad(1, 32, 32))[0]
    assert by_parts - whole == 2 * LLAMA["vocab_size"] * LLAMA["hidden_size"]


@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (3, 2)])
def test_ranks_together_do_what_one_would_do(llama: DecoderSpec, shape: tuple[int, int]) -> None:
    load = StepLoad(num_seqs=4, num_new=1, context_len=99)
    assert cost_of(llama, *shape, load) == pytest.approx(cost_of(llama, 1, 1, load))


def test_a_kv_head_that_two_ranks_hold_is_computed_twice(llama: DecoderSpec) -> None:
    load = StepLoad(num_seqs=4, num_new=1, context_len=99)
    alone, two = cost_of(llama, 1, 1, load), cost_of(llama, 2, 1, load)
    assert two[2] / alone[2] == pytest.approx(4 / 3)
    assert two[0] > alone[0]


def test_a_token_s_messages_between_tensor_ranks_and_stages(llama: DecoderSpec) -> None:
    load, hidden_bytes = StepLoad(num_seqs=4, num_new=1, context_len=99), 4 * 72 * 2
    plan = make_plan(model_sizes(llama), 2, 2)
    first, last = (step_cost(llama, plan, stage, 0, load, 2) for stage in (0, 1))
    num_layers = len(plan.stages[0])
    assert first.tensor == Traffic(2 * (2 * num_layers + 1), (2 * num_layers + 1) * hidden_bytes)
    assert (first.pipeline, last.pipeline) == (Traffic(1, hidden_bytes), Traffic())
    best_bytes = 4 * 2 * 8  # a score and a column a sequence, in float64
    assert last.tensor == Traffic(2 * 2 * (5 - num_layers) + 1, 2 * (5 - num_layers) * hidden_bytes + best_bytes)


def test_a_token_does_the_work_of_its_experts_and_a_batch_reads_more_of_them(tmp_path: Path) -> None:
    spec = read_model_config(save("mixtral", tmp_path))[1]
    one, many = cost_of(spec, 1, 1, StepLoad(1, 1, 0)), cost_of(spec, 1, 1, StepLoad(64, 1, 0))
    assert many[0] == pytest.approx(64 * one[0])
    experts = 3 * 5 * 3 * 72 * 84 * 2
    assert many[1] - one[1] == pytest.approx(experts * ((1 - 0.6**64) - 0.4))
