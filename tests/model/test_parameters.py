"""Every element of every parameter is owned as the plan says, for any decoder and any counts."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.parallel.plan import Axis, make_plan
from shardray.runtime.model.parameters import (
    Parameter,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    model_sizes,
)
from shardray.runtime.model.spec import Attention, DecoderSpec, Learned, Mlp, Norm, Rotary


@st.composite
def decoder_specs(draw: st.DrawFn) -> DecoderSpec:
    flag = st.booleans()
    num_kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    attention = Attention(
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=1.0,
        qkv_bias=draw(flag),
        out_bias=draw(flag),
    )
    return DecoderSpec(
        vocab_size=draw(st.integers(1, 80)),
        hidden_size=draw(st.integers(1, 9)),
        num_layers=draw(st.integers(1, 6)),
        max_positions=64,
        norm=Norm(draw(st.sampled_from(["rms", "layer"])), 1e-5),
        positions=draw(st.sampled_from([Rotary(1e4, 2), Learned(7), Learned(7, offset=2)])),
        attention=attention,
        mlp=Mlp(draw(st.integers(1, 70)), "silu", draw(flag), draw(flag), draw(flag)),
        tied_embeddings=draw(flag),
    )


def all_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    return embedding_parameters(spec) | head_parameters(spec) | layer_parameters(spec)


@given(spec=decoder_specs(), tp_size=st.integers(1, 7), data=st.data())
@settings(deadline=None)
def test_the_ranks_together_own_each_element_once_and_only_kv_heads_are_shared(
    spec: DecoderSpec, tp_size: int, data: st.DataObject
) -> None:
    split = data.draw(st.none() | st.lists(st.floats(0.2, 5), min_size=tp_size, max_size=tp_size))
    plan = make_plan(model_sizes(spec), tp_size, 1, split)
    for name, parameter in all_parameters(spec).items():
        owners = np.zeros(parameter.shape, dtype=int)
        for tp_rank in range(tp_size):
            owners[parameter.owned(plan, tp_rank)] += 1
        if parameter.split is None:
            assert (owners == tp_size).all(), name
        elif parameter.split.axis is Axis.KV_HEADS:
            assert (owners >= 1).all(), name
        else:
            assert (owners == 1).all(), name


@given(spec=decoder_specs(), tp_size=st.integers(1, 7))
@settings(deadline=None)
def test_a_rank_s_slices_of_one_layer_fit_together(spec: DecoderSpec, tp_size: int) -> None:
    plan = make_plan(model_sizes(spec), tp_size, 1)
    dim = spec.attention.head_dim
    for tp_rank in range(tp_size):

        def shape(name: str, tp_rank: int = tp_rank) -> tuple[int, ...]:
            owned = layer_parameters(spec)[name].owned(plan, tp_rank)
            return tuple(part.stop - part.start for part in owned)

        assert shape("q.weight") == (len(plan.heads[tp_rank]) * dim, spec.hidden_size)
        assert shape("k.weight") == shape("v.weight") == (len(plan.kv_heads[tp_rank]) * dim, spec.hidden_size)
        assert shape("o.weight") == shape("q.weight")[::-1]
        assert shape("down.weight") == shape("up.weight")[::-1]
        if spec.mlp.gated:
            assert shape("gate.weight") == shape("up.weight")
        if spec.attention.qkv_bias:
            assert shape("k.bias") == shape("k.weight")[:1]


@given(spec=decoder_specs())
def test_biases_exist_where_the_spec_has_them(spec: DecoderSpec) -> None:
    names = all_parameters(spec).keys()
    assert {f"{name}.bias" in names for name in "qkv"} == {spec.attention.qkv_bias}
    assert ("o.bias" in names) == spec.attention.out_bias
    assert ("up.bias" in names) == spec.mlp.up_bias
    assert ("gate.bias" in names) == (spec.mlp.up_bias and spec.mlp.gated)
    assert ("down.bias" in names) == spec.mlp.down_bias
    assert ("final_norm.bias" in names) == (spec.norm.kind == "layer")
    assert ("positions.weight" in names) == isinstance(spec.positions, Learned)
