"""Our matrix product of bfloat16 on CPUs, each variant of it, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardray.parallel.comm import SoloComm
from shardray.parallel.kernels import linear
from shardray.parallel.kernels.linear import PackedLinear
from shardray.parallel.layers import ColumnParallelLinear, Linear, RowParallelLinear, VocabParallelHead

VARIANTS = [variant for variant in ("pairs", "halves", "narrow") if linear.runs_here(variant)]
SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 90))  # (N, K)
MANY = 700  # tokens: more than a task takes at once


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def check(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of the result, and of the float32 additions of terms as large as these."""
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    expected = x.double() @ weight.double().T + bias.double()
    sizes = x.double().abs() @ weight.double().abs().T + bias.double().abs() + 2**-20
    rounding = expected.abs() * (2**-8 if found.dtype == torch.bfloat16 else 0.0)
    assert found.shape == expected.shape
    assert torch.all((found.double() - expected).abs() <= rounding + sizes * (x.shape[1] + 1) * 2**-24)


@pytest.mark.parametrize("variant", VARIANTS)
@given(shape=SHAPES, num_tokens=st.integers(0, 40), biased=st.booleans(), wide=st.booleans(), threads=st.integers(1, 2))
@settings(max_examples=60)
def test_a_product_is_that_of_float64_up_to_rounding(
    variant: str, shape: tuple[int, int], num_tokens: int, biased: bool, wide: bool, threads: int
) -> None:
    torch.manual_seed(sum(shape))
    torch.set_num_threads(threads)
    weight, x, bias = normal(*shape), normal(num_tokens, shape[1]), normal(shape[0]) if biased else None
    dtype = torch.float32 if wide else torch.bfloat16
    found = PackedLinear(weight, bias, variant)(x, dtype)
    assert found.dtype == dtype
    check(found, x, weight, bias)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("in_size", [576, 5001])  # one pass over K, and several
def test_a_row_gets_the_same_bits_whatever_the_batch_the_place_and_the_threads(variant: str, in_size: int) -> None:
    torch.manual_seed(0)
    weight, x = normal(176, in_size), normal(MANY, in_size)
    product = PackedLinear(weight, normal(176), variant)
    torch.set_num_threads(1)
    alone = torch.cat([product(row[None], torch.float32) for row in x])
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_tokens in (1, 2, 5, 6, 7, 32, 333, MANY):
            batch = slice(MANY - num_tokens, MANY)
            assert torch.equal(product(x[batch], torch.float32), alone[batch])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_output_gets_the_same_bits_whatever_block_of_outputs_it_is_in(variant: str) -> None:
    weight, x = normal(200, 96), normal(9, 96)
    whole = PackedLinear(weight, None, variant)(x)
    parts = [PackedLinear(part, None, variant)(x) for part in weight.split([13, 64, 123])]
    assert torch.equal(whole, torch.cat(parts, dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_infinities_and_nans_stay_in_their_rows_and_outputs(variant: str) -> None:
    weight, x = normal(70, 40), normal(8, 40)
    expected = PackedLinear(weight, None, variant)(x)
    weight[3, 5], x[2, 7] = torch.inf, torch.nan
    found = PackedLinear(weight, None, variant)(x)
    touched = torch.zeros(8, 70, dtype=torch.bool)
    touched[2], touched[:, 3] = True, True
    assert not found[touched].isfinite().any()
    assert torch.equal(found[~touched], expected[~touched])


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_wider_tensor_are_taken_as_they_are(variant: str) -> None:
    weight, wide = normal(32, 24), normal(6, 30)
    product = PackedLinear(weight, None, variant)
    assert torch.equal(product(wide[:, :24]), product(wide[:, :24].contiguous()))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=["no outputs", "no inputs"])
def test_an_empty_block_gives_zeros_or_nothing(shape: tuple[int, int]) -> None:
    found = Linear(normal(*shape))(normal(3, shape[1]), torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.zeros(3, shape[0]))


def test_layers_round_once_and_logits_not_at_all() -> None:
    weight, bias, x = normal(48, 64), normal(48), normal(5, 64)
    merged = ColumnParallelLinear.merged(weight.split(16), bias.split(16))
    assert merged(x).dtype == torch.bfloat16
    check(merged(x), x, weight, bias)
    check(RowParallelLinear(weight, bias, SoloComm())(x), x, weight, bias)
    logits = VocabParallelHead(weight, None, [48], SoloComm())(x)
    assert logits is not None
    assert logits.dtype == torch.float32


def test_amx_leaves_the_product_to_onednn_and_older_processors_get_a_variant_they_can_run() -> None:
    assert linear.variant_for({"avx512f", "avx512bf16", "amx-bf16"}) is None
    assert linear.variant_for({"avx512f", "avx512bf16"}) == "pairs"
    assert linear.variant_for({"avx512f"}) == "halves"
    assert linear.variant_for({"avx2", "fma"}) == "narrow"
