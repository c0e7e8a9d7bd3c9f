"""Every kernel for CUDA compiled for an H100 or H200 (sm_90), as it is started in production; no device is needed.

Registers and shared memory are read from the binary, with the tools that come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from shardray.parallel.kernels import triton_linear  # noqa: E402
from shardray.runtime.model.kernels import triton_attention, triton_elementwise, triton_ops  # noqa: E402
from shardray.runtime.model.kernels.splits import SPLIT, TILE  # noqa: E402
from shardray.runtime.model.spec import Activation  # noqa: E402

SHARED_BYTES = 227 << 10  # of one core, as much as a program may take
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
HEAD_DIMS = [64, 80, 96, 128, 192, 256]
INTEGERS = {"*i8", "*i32", "*i64", "i32"}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"WINDOW": 4096},
    "window and softcap": {"WINDOW": 4096, "SOFTCAP": 72.0},
    "sinks": {"WINDOW": 128, "HAS_SINKS": True},
    "slopes": {"BIAS": "slopes"},
    "table": {"BIAS": "table", "FURTHEST": 128, "CAUSAL": False},
}


def compile_kernel(
    kernel: Any, values: dict[str, Any], options: dict[str, int], early: bool = False
) -> tuple[int, int]:
    """Bytes of shared memory, and bytes that spill. ``values``: a type for each argument, or its constant.

    Pointers and numbers that are divisible by 16 are said to be, as Triton finds out when a kernel is started; "i32!"
    is a number that is not, or that it is told not to look at.
    """
    values = {"EARLY": False} | values
    types = {name: value for name, value in values.items() if isinstance(value, str) and value.rstrip("!") in KINDS}
    signature = {name: types.get(name, "constexpr").rstrip("!") for name in kernel.arg_names}
    constants = {name: values[name] for name in kernel.arg_names if name not in types}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "fp32") not in ("fp32", "i32!")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    target = GPUTarget("cuda", 90, 32)
    binary = triton.compile(source, target=target, options=options)
    return binary.metadata.shared, _spilled_bytes(binary.asm["cubin"])


KINDS = {*TYPES.values(), *INTEGERS, "fp32"}


def _spilled_bytes(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    uses = dict(re.findall(r"(STACK|LOCAL):(\d+)", told.stdout))
    return int(uses["STACK"]) + int(uses["LOCAL"])


def check(kernel: Any, values: dict[str, Any], num_warps: int, num_stages: int = 3, programs: int = 1) -> None:
    """No spills, and room for so many programs on a core."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    shared_bytes, spilled_bytes = compile_kernel(kernel, values, options)
    assert spilled_bytes == 0
    assert shared_bytes <= SHARED_BYTES // programs


def attention_values(dtype: torch.dtype, head_dim: int, features: dict[str, Any]) -> dict[str, Any]:
    t = TYPES[dtype]
    plain = {"WINDOW": 0, "SOFTCAP": 0.0, "BIAS": "none", "FURTHEST": 0, "CAUSAL": True, "HAS_SINKS": False}
    values = plain | features
    return values | {
        "queries": t, "keys": t, "values": t, "out": t, "tables": "*i32", "context_lens": "*i32", "splits": "*i32",
        "split_starts": "*i32", "query_starts": "*i32", "tiles": "*i32", "groups": "*i64", "kv_of_head": "*i64",
        "bias": None if values["BIAS"] == "none" else "*fp32", "sinks": "*fp32" if values["HAS_SINKS"] else None,
        "partial_sums": "*fp32", "partial_stats": "*fp32", "num_rows": "i32!", "num_heads": "i32!",
        "num_kv_heads": "i32!", "page_heads": "i32!", "query_stride": "i32", "table_stride": "i32!", "scale": "fp32",
        "D": head_dim, "BLOCK_D": triton_ops.power_of_two(head_dim), "PAGE": 16, "SPLIT": SPLIT, "TILE": TILE,
        "PRECISION": "ieee",
    }  # fmt: skip


VARIANTS = [
    *((dtype, head_dim, "plain", 4) for dtype in TYPES for head_dim in HEAD_DIMS),
    *((torch.bfloat16, head_dim, feature, 8) for feature in FEATURES for head_dim in (64, 128, 256)),
    (torch.bfloat16, 64, "plain", 71),
    (torch.bfloat16, 128, "plain", 48),
    (torch.bfloat16, 128, "plain", 20),
]


@pytest.mark.parametrize(("dtype", "head_dim", "feature", "largest_group"), VARIANTS)
def test_attention_fits_a_core(dtype: torch.dtype, head_dim: int, feature: str, largest_group: int) -> None:
    values = attention_values(dtype, head_dim, FEATURES[feature])
    blocks = triton_ops.decode_blocks(dtype, head_dim, largest_group)
    assert SPLIT % blocks.columns == 0
    values |= {"BLOCK_H": blocks.rows, "BLOCK_N": blocks.columns}
    programs = triton_ops.PROGRAMS_A_CORE if largest_group <= 32 else 1
    check(triton_attention.decode, values, blocks.num_warps, blocks.num_stages, programs)
    check(triton_attention.combine, values | {"BLOCK_S": triton_ops.SPLITS_AT_ONCE}, 4)
    blocks = triton_ops.prefill_blocks(dtype, head_dim)
    assert TILE % blocks.rows == 0
    values |= {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns}
    check(triton_attention.prefill, values, blocks.num_warps, blocks.num_stages)


def test_every_kernel_compiles_to_be_started_early() -> None:
    early = {"EARLY": True}
    values = attention_values(torch.bfloat16, 128, {}) | product_values(4096, "*bf16", None) | early
    values |= norm_values(4096, torch.bfloat16, True) | rotation_values(128, 64, torch.bfloat16, False)
    values |= {"inner": "*bf16", "KIND": "silu", "GATED": True, "BLOCK": 4096, "BLOCK_H": 16, "BLOCK_M": 128}
    values |= {"keys": "*bf16", "values": "*bf16", "weight": "*bf16", "bias": None, "HAS_BIAS": False}
    kernels = (
        triton_attention.decode, triton_attention.combine, triton_attention.prefill, triton_linear.narrow_linear,
        triton_elementwise.add_norm, triton_elementwise.rotate_and_store, triton_elementwise.activate,
    )  # fmt: skip
    for kernel in kernels:
        own = values | {"BLOCK_N": 64 if kernel.fn.__module__ == triton_attention.__name__ else 16}
        compile_kernel(kernel, own | {"BLOCK_S": triton_ops.SPLITS_AT_ONCE}, {"num_warps": 8, "launch_pdl": True})


def test_attention_of_one_kv_head_compiles() -> None:
    """Triton makes a constant of a count that is one."""
    values = attention_values(torch.bfloat16, 64, {}) | {"num_kv_heads": 1, "page_heads": 1}
    blocks = triton_ops.decode_blocks(torch.bfloat16, 64, 8)
    values |= {"BLOCK_H": blocks.rows, "BLOCK_N": blocks.columns}
    check(triton_attention.decode, values, blocks.num_warps, blocks.num_stages)
    check(triton_attention.prefill, values | {"BLOCK_M": 128}, 8)


@pytest.mark.parametrize("num_outputs", [1024, 4096, 28_672, 151_936])
@pytest.mark.parametrize("out", ["*bf16", "*fp32"])
def test_a_narrow_product_fits_a_core(num_outputs: int, out: str) -> None:
    _, _, num_warps, num_stages = triton_linear.blocks(num_outputs)
    for bias in (None, "*bf16"):
        for in_int8 in (False, True):
            values = product_values(num_outputs, out, bias, in_int8)
            check(triton_linear.narrow_linear, values, num_warps, num_stages, programs=3)


def product_values(num_outputs: int, out: str, bias: str | None, in_int8: bool = False) -> dict[str, Any]:
    block_n, block_k, _, _ = triton_linear.blocks(num_outputs)
    return {
        "x": "*bf16", "weight": "*i8" if in_int8 else "*bf16", "scales": "*fp32" if in_int8 else None, "bias": bias,
        "out": out, "num_tokens": "i32!", "num_outputs": "i32", "HAS_SCALES": in_int8,
        "num_inputs": "i32", "x_stride": "i32", "BLOCK_T": triton_linear.TILE_TOKENS, "BLOCK_N": block_n,
        "BLOCK_K": block_k, "HAS_BIAS": bias is not None,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [576, 4096, 16_384])
def test_norms_fit_a_core(size: int, dtype: torch.dtype) -> None:
    for is_rms in (True, False):
        check(triton_elementwise.add_norm, norm_values(size, dtype, is_rms), triton_ops.norm_warps(size))


def norm_values(size: int, dtype: torch.dtype, is_rms: bool) -> dict[str, Any]:
    return {
        "x": TYPES[dtype], "delta": TYPES[dtype], "weight": "*fp32", "bias": None if is_rms else "*fp32",
        "out": TYPES[dtype], "size": "i32", "eps": "fp32", "BLOCK": triton_ops.power_of_two(size),
        "HAS_DELTA": True, "HAS_WEIGHT": True, "HAS_BIAS": not is_rms, "IS_RMS": is_rms,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 16), (128, 64), (256, 0)])
def test_rotation_fits_a_core(head_dim: int, half: int, dtype: torch.dtype) -> None:
    for interleaved in (False, True):
        check(triton_elementwise.rotate_and_store, rotation_values(head_dim, half, dtype, interleaved), 2)


def rotation_values(head_dim: int, half: int, dtype: torch.dtype, interleaved: bool) -> dict[str, Any]:
    angles = "*fp32" if half else None
    return {
        "qkv": TYPES[dtype], "cos": angles, "sin": angles, "cache_index": "*i64", "keys": TYPES[dtype],
        "values": TYPES[dtype], "num_heads": "i32!", "num_kv_heads": "i32!", "first_head": "i32!", "D": head_dim,
        "BLOCK_D": triton_ops.power_of_two(head_dim), "HALF": half, "BLOCK_HALF": triton_ops.power_of_two(half),
        "INTERLEAVED": interleaved, "PAGE": 16, "HEADS": triton_ops.HEADS_A_PROGRAM,
    }  # fmt: skip


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_fit_a_core(activation: Activation) -> None:
    for gated in (True, False):
        if gated or activation != "clamped_swiglu":
            values = {"inner": "*bf16", "out": "*bf16", "size": "i32", "KIND": activation, "GATED": gated}
            check(triton_elementwise.activate, values | {"BLOCK": triton_ops.COLUMNS_A_PROGRAM}, 4)
