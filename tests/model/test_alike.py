"""What is reckoned for the first of the ranks that are alike is what each of them would have."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.parallel.plan import ShardPlan, make_plan
from shardray.runtime.model.alike import first_alike_ranks, first_alike_stages
from shardray.runtime.model.costs import StepLoad, step_cost
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.parameters import model_sizes, num_cached_layers, num_copied_elements, num_owned_elements
from shardray.runtime.model.spec import DecoderSpec
from tests.model.encoder_zoo import save_encoder
from tests.model.test_parameters import decoder_specs
from tests.tiny_models import save_llama

DECODING = StepLoad(num_seqs=3, num_new=2, context_len=7, prompt_len=5)
ENCODING = StepLoad(num_seqs=1, num_new=5, context_len=0, is_encoding=True)


def reckoned(spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int) -> tuple[object, ...]:
    return (
        num_owned_elements(spec, plan, stage, tp_rank),
        num_copied_elements(spec, plan, stage, tp_rank),
        num_cached_layers(spec, plan, stage),
        len(plan.kv_heads[tp_rank]),
        *(step_cost(spec, plan, stage, tp_rank, load, 2) for load in (DECODING, ENCODING)[not spec.layers :]),
    )


def assert_alike(spec: DecoderSpec, plan: ShardPlan) -> None:
    stages, ranks = first_alike_stages(spec, plan), first_alike_ranks(spec, plan)
    for stage, tp_rank in itertools.product(range(plan.pp_size), range(plan.tp_size)):
        assert reckoned(spec, plan, stage, tp_rank) == reckoned(spec, plan, stages[stage], ranks[tp_rank])


@given(spec=decoder_specs(), tp_size=st.integers(1, 7), data=st.data())
@settings(max_examples=60)
def test_any_decoder_and_any_cut(spec: DecoderSpec, tp_size: int, data: st.DataObject) -> None:
    pp_size = data.draw(st.integers(1, spec.num_layers))
    split = data.draw(st.none() | st.lists(st.sampled_from([1.0, 2.5]), min_size=tp_size, max_size=tp_size))
    assert_alike(spec, make_plan(model_sizes(spec), tp_size, pp_size, split))


@pytest.mark.parametrize("name", ["bart", "t5, gated", "modernbert"])
def test_an_encoder_with_and_without_a_decoder(name: str, tmp_path: Path) -> None:
    spec = read_model_config(save_encoder(name, tmp_path))[1]
    for tp_size, pp_size in itertools.product((1, 3, 4), range(1, spec.num_layers + 1)):
        assert_alike(spec, make_plan(model_sizes(spec), tp_size, pp_size))


def test_of_many_ranks_few_are_not_alike(tmp_path: Path) -> None:
    spec = read_model_config(save_llama(tmp_path, num_hidden_layers=12))[1]
    plan = make_plan(model_sizes(spec), 16, 6)
    assert len(set(first_alike_stages(spec, plan))) <= 4
    assert len(set(first_alike_ranks(spec, plan))) <= 4
