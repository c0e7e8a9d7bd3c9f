"""The product with weights of 8 bits, each variant of it, against the same rounding done by torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardray.parallel import layers
from shardray.parallel.comm import SoloComm
from shardray.parallel.kernels import int8_linear
from shardray.parallel.kernels.int8_linear import PackedInt8Linear
from shardray.parallel.kernels.int8_tile import GROUP
from shardray.parallel.kernels.linear import cpu_features
from shardray.parallel.layers import ColumnParallelLinear, Linear, RowParallelLinear, VocabParallelHead
from shardray.parallel.quantized import Int8Weight, join_weights, quantize

_NEEDS = {"quads": {"avx512f", "avx512vnni"}}
VARIANTS = [name for name in ("quads", "shorts", "narrow") if _NEEDS.get(name, set()) <= cpu_features()]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MANY = 700  # tokens: more than a task takes at once


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, groups, GROUP) of whole numbers, and (T, groups) float32 scales"""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = groups.abs().amax(dim=-1)
    factor = torch.where(top > 0, torch.full_like(top, 127.0) / top, 0.0)  # (a number / top: torch's is no division)
    return torch.round(groups * factor[..., None]), top * torch.tensor(1.0 / 127.0)


def check(found: Tensor, x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> None:
    """Within the rounding of the result, and of the float32 additions of one term for each group."""
    numbers, scales = rounded(x)
    values = torch.nn.functional.pad(weight.values.double(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    terms = torch.einsum("tgk,ngk->tng", numbers.double(), values) * scales.double()[:, None]
    bias = torch.zeros(weight.values.shape[0]) if bias is None else bias
    expected = weight.scales.T.double() * terms.sum(dim=-1) + bias.double()
    sizes = weight.scales.T.double() * terms.abs().sum(dim=-1) + bias.double().abs() + 2**-20
    relative = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(found.dtype, 0.0)
    rounding = expected.abs() * relative + (2**-24 if found.dtype == torch.float16 else 0.0)  # of its smallest numbers
    assert found.shape == expected.shape
    assert torch.all((found.double() - expected).abs() <= rounding + sizes * (terms.shape[-1] + 4) * 2**-23)


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 300)), num_tokens=st.integers(0, 40), biased=st.booleans(),
    dtype=st.sampled_from(DTYPES), out_dtype=st.sampled_from(DTYPES), threads=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=60)
def test_a_product_is_that_of_what_was_rounded(
    variant: str, shape: tuple[int, int], num_tokens: int, biased: bool, dtype: torch.dtype, out_dtype: torch.dtype,
    threads: int,
) -> None:  # fmt: skip
    torch.manual_seed(sum(shape))
    torch.set_num_threads(threads)
    weight, x = quantize(torch.randn(shape)), torch.randn(num_tokens, shape[1]).to(dtype)
    bias = torch.randn(shape[0]) if biased else None
    found = PackedInt8Linear(*weight, bias, variant)(x, out_dtype)
    assert found.dtype == out_dtype
    check(found, x, weight, bias)


def test_every_processor_gives_the_same_bits() -> None:
    weight, x = quantize(torch.randn(200, 333)), torch.randn(23, 333)
    found = [PackedInt8Linear(*weight, torch.ones(200), variant)(x, torch.float32) for variant in VARIANTS]
    assert len(found) > 1
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("in_size", [576, 5001])  # one pass over K, and several
def test_a_row_gets_the_same_bits_whatever_the_batch_the_place_and_the_threads(variant: str, in_size: int) -> None:
    torch.manual_seed(0)
    weight, x = quantize(torch.randn(176, in_size)), torch.randn(MANY, in_size).bfloat16()
    product = PackedInt8Linear(*weight, torch.randn(176), variant)
    torch.set_num_threads(1)
    alone = torch.cat([product(row[None], torch.float32) for row in x])
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_tokens in (1, 2, 5, 6, 7, 32, 333, MANY):
            batch = slice(MANY - num_tokens, MANY)
            assert torch.equal(product(x[batch], torch.float32), alone[batch])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_output_gets_the_same_bits_whatever_block_of_outputs_it_is_in(variant: str) -> None:
    weight, x = quantize(torch.randn(200, 96)), torch.randn(9, 96)
    whole = PackedInt8Linear(*weight, None, variant)(x, torch.float32)
    rows = [slice(0, 13), slice(13, 77), slice(77, 200)]
    parts = [PackedInt8Linear(weight.values[part], weight.scales[part], None, variant) for part in rows]
    assert torch.equal(whole, torch.cat([part(x, torch.float32) for part in parts], dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nans_stay_in_their_rows(variant: str, bad: float) -> None:
    product, x = PackedInt8Linear(*quantize(torch.randn(70, 140)), None, variant), torch.randn(8, 140)
    expected = product(x, torch.float32)
    x[2, 7] = bad
    found = product(x, torch.float32)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3, 4, 5, 6, 7]], expected[[0, 1, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_and_the_largest_numbers_there_are_come_out_exactly(variant: str) -> None:
    """At the largest, a sum is as large as one of 16 bits a product can make it, and as one of 32 bits has to hold."""
    values = torch.full((3, 4 * GROUP), 127, dtype=torch.int8)
    values[1] = -127
    product = PackedInt8Linear(values, torch.ones(3, 1), None, variant)
    x = torch.stack((torch.zeros(4 * GROUP), torch.full((4 * GROUP,), 127.0), torch.full((4 * GROUP,), -127.0)))
    most = 4.0 * GROUP * 127 * 127
    assert product(x, torch.float32).tolist() == [[0.0, -0.0, 0.0], [most, -most, most], [-most, most, -most]]


def test_weights_are_the_nearest_there_are_and_rows_of_zeros_stay_zeros() -> None:
    weight = torch.randn(5, 64)
    weight[3] = 0.0
    values, scales = quantize(weight)
    assert values.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127]
    assert torch.all((values * scales - weight).abs() <= 0.5001 * scales)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=["no outputs", "no inputs"])
def test_an_empty_block_gives_zeros_or_nothing(shape: tuple[int, int]) -> None:
    weight = Int8Weight(torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0], 1))
    found = Linear(weight)(torch.randn(3, shape[1]).bfloat16(), torch.float32)
    assert torch.equal(found, torch.zeros(3, shape[0]))


def test_layers_take_weights_of_8_bits_as_they_take_others() -> None:
    parts, biases = [quantize(torch.randn(16, 64)) for _ in range(3)], torch.randn(48).split(16)
    whole, bias, x = join_weights(parts), torch.cat(biases), torch.randn(5, 64).bfloat16()
    assert isinstance(whole, Int8Weight)
    merged = ColumnParallelLinear.merged(parts, biases)
    assert merged(x).dtype == torch.bfloat16
    check(merged(x), x, whole, bias)
    check(RowParallelLinear(whole, bias, SoloComm())(x), x, whole, bias)
    check(VocabParallelHead(whole, None, [48], SoloComm())(x), x, whole)


def test_without_a_kernel_the_weight_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "packed_layout", lambda device_type, dtype: None)
    weight, bias, x = quantize(torch.randn(48, 64)), torch.randn(48), torch.randn(5, 64)
    expected = x @ (weight.values * weight.scales).T + bias
    assert Linear(weight, bias)(x).sub(expected).abs().max() < 1e-4 * expected.abs().max()


def test_every_processor_gets_a_variant_that_it_can_run() -> None:
    assert int8_linear.variant_for({"avx512f", "avx512vnni"}) == "quads"
    assert int8_linear.variant_for({"avx512f"}) == "shorts"
    assert int8_linear.variant_for({"avx2", "fma"}) == "narrow"
