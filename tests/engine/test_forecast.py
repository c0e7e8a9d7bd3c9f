"""Rates follow from bytes, FLOPs and messages, whichever is slowest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardray.runtime.engine.forecast import (
    decode_cost,
    decode_tokens_per_s,
    mesh_rates,
    prefill_rates,
    prompt_cost,
    prompt_steps,
)
from shardray.runtime.engine.hardware import Hardware, Launches, Machine, Speed
from shardray.runtime.engine.served import ServedSpec, read_served
from shardray.runtime.engine.shapes import cut
from tests.model.encoder_zoo import save_encoder
from tests.tiny_models import save_llama

READS = Hardware.of(
    memory_bytes_per_s=1e9, flops_per_s=1e18, link_bytes_per_s=1e18, message_s=0.0
)  # nothing else counts
MULTIPLIES = Hardware.of(memory_bytes_per_s=1e18, flops_per_s=1e9, link_bytes_per_s=1e18, message_s=0.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedSpec:
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    return read_served(
        folder, "float32", None, SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64, block_size=16)
    )


def test_a_step_takes_as_long_as_its_bytes_or_its_arithmetic(served: ServedSpec) -> None:
    plan, cost = cut(served.spec, 1, 1, False), decode_cost(served, cut(served.spec, 1, 1, False), 4, 100)
    assert decode_tokens_per_s(served, plan, 4, 100, READS) == pytest.approx(1e9 / cost.num_bytes)
    assert decode_tokens_per_s(served, plan, 4, 100, MULTIPLIES) == pytest.approx(1e9 / cost.flops)


def test_a_batch_shares_the_reading_of_weights(served: ServedSpec) -> None:
    plan = cut(served.spec, 1, 1, False)
    assert decode_tokens_per_s(served, plan, 8, 10, READS) > 6 * decode_tokens_per_s(served, plan, 1, 10, READS)


def test_stages_do_not_hasten_one_stream_but_work_side_by_side_on_many(served: ServedSpec) -> None:
    one, five = cut(served.spec, 1, 1, False), cut(served.spec, 1, 5, False)
    alone = decode_tokens_per_s(served, one, 1, 10, MULTIPLIES)
    assert decode_tokens_per_s(served, five, 1, 10, MULTIPLIES) == pytest.approx(alone)
    assert 3.5 * alone < decode_tokens_per_s(served, five, 5, 10, MULTIPLIES) < 5 * alone


def test_messages_take_time_even_when_they_carry_little(served: ServedSpec) -> None:
    plan, slow = cut(served.spec, 3, 1, False), dataclasses.replace(READS, message_s=1.0)
    cost = decode_cost(served, plan, 1, 10)
    assert cost.num_messages == (2 * 5 + 1) * 4 + 2  # sums of layers and embedding, the best token
    assert 1 / decode_tokens_per_s(served, plan, 1, 10, slow) == pytest.approx(cost.num_messages, rel=1e-3)


def test_a_long_prompt_is_read_in_chunks_of_a_step(served: ServedSpec) -> None:
    chunks = [(load.context_len, load.num_new) for load in prompt_steps(served, 150, 1)]
    assert chunks == [(0, 64), (64, 64), (128, 22)]
    plan = cut(served.spec, 1, 1, False)
    rate, first_token_s = prefill_rates(served, plan, 150, MULTIPLIES)
    assert rate == pytest.approx(1e9 / prompt_cost(served, plan, 150).flops)
    assert first_token_s == pytest.approx(150 / rate)


def test_stages_read_the_chunks_of_a_prompt_side_by_side(served: ServedSpec) -> None:
    """Each takes a second for each of its layers and chunks; the second stage has a chunk when the first is through."""
    launched = dataclasses.replace(READS, prefill_launches=Launches(0.0, 1.0))
    plan = cut(served.spec, 1, 2, False)
    first, second = map(len, plan.stages)
    chunks = [(load.context_len, load.num_new) for load in prompt_steps(served, 90, 2)]
    assert chunks == [(0, 32), (32, 32), (64, 26)]
    expected_s = first + 2 * max(first, second) + second
    assert prefill_rates(served, plan, 90, launched)[1] == pytest.approx(expected_s, rel=1e-2)


def test_an_encoder_generates_nothing(tmp_path: Path) -> None:
    folder = save_encoder("bert", tmp_path)
    bounds = SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64, block_size=16)
    bert = read_served(folder, "float32", None, bounds)
    rates = mesh_rates(bert, cut(bert.spec, 2, 1, False), 4, 32, 32, READS)
    assert (rates.stream_tokens_per_s, rates.decode_tokens_per_s) == (0.0, 0.0)
    assert rates.prefill_tokens_per_s > 0


def test_a_step_and_each_of_its_layers_have_to_be_launched(served: ServedSpec) -> None:
    plan = cut(served.spec, 1, 1, False)
    launched = dataclasses.replace(
        READS, decode_launches=Launches(1.0, 0.5, 0.25), prefill_launches=Launches(2.0, 0.25)
    )
    assert 4 / decode_tokens_per_s(served, plan, 4, 10, launched) == pytest.approx(1.0 + 5 * (0.5 + 4 * 0.25), rel=1e-2)
    assert prefill_rates(served, plan, 150, launched)[1] == pytest.approx(3 * (2.0 + 5 * 0.25), rel=1e-2)


def test_ranks_of_one_machine_read_no_faster_than_the_machine(served: ServedSpec) -> None:
    alone, two = cut(served.spec, 1, 1, False), cut(served.spec, 2, 1, False)
    shared = dataclasses.replace(READS, machine=Machine(2, Speed.of(0.6e9, 1e18)))
    gain = decode_tokens_per_s(served, two, 4, 10, shared) / decode_tokens_per_s(served, alone, 4, 10, shared)
    own = decode_tokens_per_s(served, two, 4, 10, READS) / decode_tokens_per_s(served, alone, 4, 10, READS)
    assert gain == pytest.approx(0.6 * own)


def test_stages_share_a_machine_only_while_several_of_them_are_busy(served: ServedSpec) -> None:
    plan = cut(served.spec, 1, 5, False)
    shared = dataclasses.replace(READS, machine=Machine(5, Speed.of(0.2e9, 1e18)))
    assert decode_tokens_per_s(served, plan, 1, 10, shared) == decode_tokens_per_s(served, plan, 1, 10, READS)
    slower = decode_tokens_per_s(served, plan, 5, 10, shared) / decode_tokens_per_s(served, plan, 5, 10, READS)
    assert slower == pytest.approx(0.2)
