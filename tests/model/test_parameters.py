"""Every element of every parameter is owned as the plan says, for any decoder and any counts."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from shardray.parallel.plan import Axis, ModelSizes, make_plan
from shardray.runtime.model.attention import OwnHeads
from shardray.runtime.model.parameters import (
    Parameter,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    model_sizes,
)
from shardray.runtime.model.positions import Learned
from shardray.runtime.model.spec import Attention, DecoderSpec, Embedding, Head, Layer, Mlp, Norm, Norms


@st.composite
def decoder_specs(draw: st.DrawFn) -> DecoderSpec:
    flag = st.booleans()
    num_kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    norm = draw(st.builds(Norm, st.sampled_from(["rms", "layer"]), st.just(1e-5), flag, flag))
    norms = st.sampled_from([None, norm])
    attention = Attention(
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=1.0,
        qkv_bias=draw(flag),
        out_bias=draw(flag),
        q_norm=draw(norms),
        k_norm=draw(norms),
        norm_over=draw(st.sampled_from(["head", "each", "all"])),
    )
    around = st.builds(Norms, norms, norms, norms)
    mlp = Mlp(draw(st.integers(1, 70)), "silu", draw(flag), draw(flag), draw(flag))
    layers = [Layer(attention, mlp, draw(around), draw(around)) for _ in range(draw(st.integers(1, 6)))]
    size, positions = draw(st.none() | st.integers(1, 9)), draw(st.sampled_from([None, Learned(7), Learned(7, 2)]))
    return DecoderSpec(
        vocab_size=draw(st.integers(1, 80)),
        hidden_size=draw(st.integers(1, 9)),
        max_positions=64,
        embedding=Embedding(size=size, positions=positions, norm=draw(norms)),
        layers=tuple(layers),
        head=Head(draw(norms), tied=draw(flag), bias=draw(flag)),
    )


def all_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """Those of the last layer for all layers."""
    return embedding_parameters(spec) | head_parameters(spec) | layer_parameters(spec, spec.layers[-1])


@given(spec=decoder_specs(), tp_size=st.integers(1, 7), data=st.data())
def test_the_ranks_together_own_each_element_once_and_only_kv_heads_are_shared(
    spec: DecoderSpec, tp_size: int, data: st.DataObject
) -> None:
    split = data.draw(st.none() | st.lists(st.floats(0.2, 5), min_size=tp_size, max_size=tp_size))
    plan = make_plan(model_sizes(spec), tp_size, 1, split)
    for name, parameter in all_parameters(spec).items():
        owners = np.zeros(parameter.shape, dtype=int)
        for tp_rank in range(tp_size):
            owners[parameter.owned(plan, tp_rank)] += 1
        axes = {split.axis for split in parameter.splits}
        if not axes:
            assert (owners == tp_size).all(), name
        elif axes == {Axis.KV_HEADS}:
            assert (owners >= 1).all(), name
        else:
            assert (owners == 1).all(), name


@given(spec=decoder_specs(), tp_size=st.integers(1, 7))
def test_a_rank_s_slices_of_one_layer_fit_together(spec: DecoderSpec, tp_size: int) -> None:
    plan = make_plan(model_sizes(spec), tp_size, 1)
    dim, mlp = spec.attention.head_dim, spec.layers[-1].mlp
    for tp_rank in range(tp_size):

        def shape(name: str, tp_rank: int = tp_rank) -> tuple[int, ...]:
            owned = layer_parameters(spec, spec.layers[-1])[name].owned(plan, tp_rank)
            return tuple(part.stop - part.start for part in owned)

        assert shape("q.weight") == (len(plan.heads[tp_rank]) * dim, spec.hidden_size)
        assert shape("k.weight") == shape("v.weight") == (len(plan.kv_heads[tp_rank]) * dim, spec.hidden_size)
        assert shape("o.weight") == shape("q.weight")[::-1]
        assert shape("down.weight") == shape("up.weight")[::-1]
        if isinstance(mlp, Mlp) and mlp.gated:
            assert shape("gate.weight") == shape("up.weight")
        if spec.attention.qkv_bias:
            assert shape("k.bias") == shape("k.weight")[:1]


@given(spec=decoder_specs())
def test_biases_exist_where_the_spec_has_them(spec: DecoderSpec) -> None:
    names, mlp = all_parameters(spec).keys(), spec.layers[-1].mlp
    assert isinstance(mlp, Mlp)
    assert {f"{name}.bias" in names for name in "qkv"} == {spec.attention.qkv_bias}
    assert ("o.bias" in names) == spec.attention.out_bias
    assert ("up.bias" in names) == mlp.up_bias
    assert ("gate.bias" in names) == (mlp.up_bias and mlp.gated)
    assert ("down.bias" in names) == mlp.down_bias
    assert ("head.bias" in names) == spec.head.bias
    assert ("positions.weight" in names) == (spec.embedding.positions is not None)


@given(spec=decoder_specs())
def test_norms_exist_where_the_spec_has_them(spec: DecoderSpec) -> None:
    names, layer = all_parameters(spec).keys(), spec.layers[-1]
    norms = {"final_norm": spec.head.norm, "embed_norm": spec.embedding.norm}
    norms |= {"q_norm": layer.attention.q_norm, "k_norm": layer.attention.k_norm}
    for place in ("before", "inner", "after"):
        norms[f"attention_norm.{place}"] = getattr(layer.attention_norms, place)
        norms[f"mlp_norm.{place}"] = getattr(layer.mlp_norms, place)
    for name, norm in norms.items():
        assert (f"{name}.weight" in names) == (norm is not None and norm.has_weight)
        assert (f"{name}.bias" in names) == (norm is not None and norm.has_bias)


@given(
    num_kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    split=st.lists(st.integers(1, 30), min_size=1, max_size=5),
)
@example(num_kv_heads=1, group=2, split=[2, 1, 2])  # the rank between has no heads
def test_a_kv_head_that_ranks_share_is_new_to_one_of_them(num_kv_heads: int, group: int, split: list[int]) -> None:
    sizes = ModelSizes(num_kv_heads * group, num_kv_heads, 64, (1.0,))
    plan = make_plan(sizes, len(split), 1, tuple(map(float, split)))
    new = [held[OwnHeads.of(plan, rank).first_new_kv_head :] for rank, held in enumerate(plan.kv_heads)]
    assert list(itertools.chain(*new)) == list(range(num_kv_heads))
