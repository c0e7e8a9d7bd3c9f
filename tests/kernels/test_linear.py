"""Products of few tokens against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardray.parallel.comm import SoloComm
from shardray.parallel.kernels import triton_linear
from shardray.parallel.layers import Linear, VocabParallelHead
from shardray.parallel.quantized import quantize
from tests.kernels.steps import normal

DTYPES = [torch.bfloat16, torch.float16]
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}


def check(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of the result, and of the float32 additions of terms as large as these."""
    bias = torch.zeros(weight.shape[0], device=x.device) if bias is None else bias
    expected = x.double() @ weight.double().T + bias.double()
    sizes = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    bound = expected.abs() * EPSILON[found.dtype] + sizes * x.shape[1] * 2**-24
    assert found.shape == expected.shape
    assert torch.all((found.double() - expected).abs() <= bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 8), (100, 90), (33, 576), (300, 700)])
def test_a_product_is_that_of_float64_up_to_rounding(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_inputs)
    weight, bias = normal(num_outputs, num_inputs, dtype=dtype), normal(num_outputs, dtype=dtype)
    for num_tokens in range(1, triton_linear.MAX_TOKENS + 1):
        x = normal(num_tokens, num_inputs + 6, dtype=dtype)[:, :num_inputs]
        check(Linear(weight, bias)(x), x, weight, bias)
        check(Linear(weight)(x, torch.float32), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    weight, x = normal(70, 600, dtype=dtype), normal(triton_linear.MAX_TOKENS, 600, dtype=dtype)
    product = Linear(weight)
    together = product(x, torch.float32)
    for num_tokens in range(1, len(x)):
        for first in range(len(x) - num_tokens + 1):
            part = slice(first, first + num_tokens)
            assert torch.equal(product(x[part], torch.float32), together[part])


def test_blocks_reach_every_output_of_a_large_vocabulary() -> None:
    weight, x = normal(9001, 16, dtype=torch.bfloat16), normal(1, 16, dtype=torch.bfloat16)
    logits = VocabParallelHead(weight, None, [9001], SoloComm())(x)
    assert logits is not None
    assert logits.dtype == torch.float32
    check(logits, x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 8), (100, 90), (300, 700)])
def test_a_weight_of_8_bits_is_that_of_its_numbers_and_scales(
    num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_inputs)
    weight, bias = quantize(normal(num_outputs, num_inputs)), normal(num_outputs, dtype=dtype)
    x = normal(triton_linear.MAX_INT8_TOKENS + 1, num_inputs, dtype=dtype)
    for num_tokens in (1, 3, triton_linear.MAX_INT8_TOKENS):
        check(Linear(weight, bias)(x[:num_tokens]), x[:num_tokens], weight.values * weight.scales.double(), bias)
    widened = weight.values * weight.scales
    many = Linear(weight, bias)(x).float()
    assert torch.allclose(many, x.float() @ widened.T + bias.float(), rtol=0.02, atol=0.02 * float(widened.norm()))


def test_more_tokens_and_wider_types_go_to_torch() -> None:
    weight, x = normal(9, 24), normal(2, 24)
    assert torch.equal(Linear(weight)(x), torch.nn.functional.linear(x, weight))
    many = normal(triton_linear.MAX_TOKENS + 1, 24, dtype=torch.bfloat16)
    assert torch.equal(Linear(weight.bfloat16())(many), torch.nn.functional.linear(many, weight.bfloat16()))
