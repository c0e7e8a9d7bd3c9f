"""Norms, rotary positions and activations against the torch reference."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from shardray.runtime.model.attention import StepView
from shardray.runtime.model.kernels.ops import Angles, NormWeights, Ops
from shardray.runtime.model.kernels.triton_ops import TritonOps
from shardray.runtime.model.spec import Activation, Norm
from tests.kernels.steps import DEVICE, DTYPES, check_close, filled_pages, make_step, normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [60, 128, 2500])
@pytest.mark.parametrize(
    "norm",
    [Norm("rms", 1e-5), Norm("rms", 1e-6, has_weight=False), Norm("layer", 1e-5, has_bias=True), Norm("layer", 1e-5)],
    ids=["rms", "rms without weights", "layer with a bias", "layer"],
)
def test_add_norm_equals_the_reference(norm: Norm, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    weight = (torch.rand(size) + 0.5).to(DEVICE) if norm.has_weight else None
    weights = NormWeights(norm, weight, normal(size) if norm.has_bias else None)
    x, delta = 3 + normal(3, size, dtype=dtype), normal(3, size, dtype=dtype)
    for addend in (delta, None):
        residual, normed = TritonOps().add_norm(weights, x.clone(), addend)
        expected_residual, expected = Ops().add_norm(weights, x.clone(), addend)
        assert torch.equal(residual, expected_residual)
        check_close(normed, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (24, 10), (80, 32), (128, 128)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(5, 2), (9, 3), (0, 1)])
def test_rotate_and_store_equals_the_reference(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    view = make_step([(1, 3), (1, 33), (4, 21)], 16, 16)
    angle = torch.rand(6, rotary_dim // 2).to(DEVICE) * 6
    check_stored(num_heads, num_kv_heads, head_dim, Angles(angle.cos(), angle.sin(), interleaved), view, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_rotary_positions_keys_and_values_are_stored_as_they_are(dtype: torch.dtype) -> None:
    check_stored(5, 3, 24, None, make_step([(1, 3), (1, 33), (4, 21)], 16, 16), dtype)


def check_stored(
    num_heads: int, num_kv_heads: int, head_dim: int, angles: Angles | None, view: StepView, dtype: torch.dtype
) -> None:
    qkv = normal(6, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    found, expected = (filled_pages(16, 16, num_kv_heads, head_dim, dtype) for _ in range(2))
    queries = [
        ops.rotate_and_store(qkv.clone(), num_heads, angles, pages, 0, view)
        for ops, pages in ((TritonOps(), found), (Ops(), expected))
    ]
    check_close(*queries, dtype)
    check_close(found.keys, expected.keys, dtype)  # those of other tokens are as they were
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_equal_the_reference_at_any_magnitude(activation: Activation, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for scale in (0.01, 1.0, 30.0):
        inner = (normal(2, 2 * 1100) * scale).to(dtype)
        for gated in (True, False):
            if gated or activation != "clamped_swiglu":
                found = TritonOps().activate(inner, activation, gated)
                expected = Ops().activate(inner.float(), activation, gated).to(dtype)
                size = max(1.0, scale) if gated else 1.0  # of the factor that an error in the activation meets
                check_close(found.float() / size, expected.float() / size, dtype)
