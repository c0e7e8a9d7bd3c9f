"""The operations of a layer on CPUs, compiled: float32 and bfloat16. What is not covered runs as torch calls."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from shardray.parallel.kernels import jit, vector
from shardray.parallel.kernels.jit import Kernel
from shardray.parallel.kernels.linear import cpu_features, runs_here, variant_for
from shardray.parallel.workspace import empty
from shardray.runtime.model.attention import KVPages, PagedAttention, StepView
from shardray.runtime.model.kernels import cpu_attention, cpu_elementwise, cpu_prefill, page_tiles
from shardray.runtime.model.kernels.ops import Angles, NormWeights, Ops
from shardray.runtime.model.kernels.page_tiles import PageElement
from shardray.runtime.model.spec import Activation

_ELEMENTS = {torch.float32: jit.FLOAT32, torch.bfloat16: jit.BFLOAT16}
_LOG2_E = math.log2(math.e)  # weights of the softmax are powers of two
_TOKENS_A_THREAD = 8  # fewer are not worth waking a second thread for
_PREFILL_ROWS = 96  # query heads of some tokens that share a KV head: what a task of prefill attention works on


def supports(dtype: torch.dtype) -> bool:
    return dtype in _ELEMENTS


class CpuOps(Ops):
    """Kernels for one dtype, run by ``num_threads`` of torch's threads."""

    def __init__(self, dtype: torch.dtype, num_threads: int) -> None:
        self._add, self._add_rms_norm, self._rotate_and_store, self._silu_gate = _compile(dtype)
        self._decode = _compile_decode(dtype, _page_element(dtype))
        self._prefill = _compile_prefill(dtype)
        self._num_threads = num_threads

    def add_norm(self, norm: NormWeights, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        if norm.norm.kind != "rms" or norm.weight is None or norm.bias is not None or not x.is_contiguous():
            return super().add_norm(norm, x, delta)
        num_tokens, size = x.shape
        out = empty(x.shape, x.dtype)
        address = 0 if delta is None else delta.data_ptr()
        self._add_rms_norm(
            self._threads(num_tokens), num_tokens, size, x.data_ptr(), address, norm.weight.data_ptr(),
            _float_address(norm.norm.eps), out.data_ptr(),
        )  # fmt: skip
        return x, out

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        if not (x.is_contiguous() and delta.is_contiguous()):
            return super().add(x, delta)
        out = empty(x.shape, x.dtype)
        addresses = x.data_ptr(), delta.data_ptr(), out.data_ptr()
        self._add(self._threads(len(x)), len(x), x.shape[1], *addresses)
        return out

    def rotate_and_store(
        self, qkv: Tensor, num_heads: int, angles: Angles | None, pages: KVPages, layer: int, view: StepView
    ) -> Tensor:
        if angles is None or angles.interleaved:
            return super().rotate_and_store(qkv, num_heads, angles, pages, layer, view)
        num_tokens, total_heads, head_dim = qkv.shape
        cos, sin = angles.cos, angles.sin
        self._rotate_and_store(
            self._threads(num_tokens), num_tokens, num_heads, (total_heads - num_heads) // 2, head_dim, cos.shape[1],
            pages.block_size, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), view.cache_index.data_ptr(),
            pages.key_addresses[layer], pages.value_addresses[layer],
        )  # fmt: skip
        return qkv[:, :num_heads]

    def attend(self, attention: PagedAttention, queries: Tensor, pages: KVPages, layer: int, view: StepView) -> Tensor:
        num_kv_heads, block_size, head_dim = pages.values.shape[2:]
        in_vectors = head_dim % vector.WIDTH == 0 and block_size % vector.WIDTH == 0
        if attention.num_heads == 0 or not (in_vectors and attention.is_plain):
            return super().attend(attention, queries, pages, layer, view)
        assert view.row_list is not None, "a step for CPUs comes with its list of rows"
        out, rows = empty(queries.shape, queries.dtype), view.row_list.data_ptr()
        shape = attention.num_heads, num_kv_heads, head_dim, block_size, view.block_tables.shape[1]
        inputs = (
            queries.data_ptr(), queries.stride(0), pages.key_addresses[layer], pages.value_addresses[layer],
            view.block_tables.data_ptr(),
        )  # fmt: skip
        groups, scale = attention.groups.data_ptr(), _float_address(attention.scale * _LOG2_E)
        if view.num_decodes:
            self._decode(
                self._num_threads, rows, self._num_threads, *shape, *inputs, view.context_lens.data_ptr(),
                groups, out.data_ptr(), scale,
            )  # fmt: skip
        if self._prefill is None:
            attention.attend_prefills(queries, out, pages, layer, view)
        elif view.prefills:
            tokens_a_task = max(1, _PREFILL_ROWS // attention.largest_group)
            self._prefill(
                self._num_threads, rows, *shape, *inputs, groups, out.data_ptr(), scale, tokens_a_task,
                tokens_a_task * attention.largest_group, attention.causal,
            )  # fmt: skip
        return out

    def activate(self, inner: Tensor, activation: Activation, gated: bool) -> Tensor:
        if not gated or activation != "silu":
            return super().activate(inner, activation, gated)
        num_tokens, size = inner.shape[0], inner.shape[1] // 2
        out = empty((num_tokens, size), inner.dtype)
        self._silu_gate(self._threads(num_tokens), num_tokens, size, inner.data_ptr(), out.data_ptr())
        return out

    def _threads(self, num_tokens: int) -> int:
        return max(1, min(self._num_threads, num_tokens // _TOKENS_A_THREAD))


@functools.cache
def _compile(dtype: torch.dtype) -> tuple[Kernel, ...]:
    functions = (
        cpu_elementwise.add, cpu_elementwise.add_rms_norm, cpu_elementwise.rotate_and_store, cpu_elementwise.silu_gate,
    )  # fmt: skip
    return tuple(jit.compile_kernel(function, _ELEMENTS[dtype]) for function in functions)


def _page_element(dtype: torch.dtype) -> PageElement:
    """How this processor reads pages of a dtype fastest."""
    if dtype == torch.float32:
        return page_tiles.FLOAT32
    return page_tiles.PAIRS if runs_here("pairs") else page_tiles.HALVES


@functools.cache
def _compile_decode(dtype: torch.dtype, page_element: PageElement) -> Kernel:
    vectors = 2 if dtype == torch.bfloat16 and variant_for(cpu_features()) == "narrow" else 4
    return jit.compile_kernel(cpu_attention.decode, cpu_attention.make_variant(_ELEMENTS[dtype], page_element, vectors))


@functools.cache
def _compile_prefill(dtype: torch.dtype) -> Kernel | None:
    """None where torch's own attention over whole prompts does better."""
    variant = variant_for(cpu_features()) if dtype == torch.bfloat16 else None
    return None if variant is None else jit.compile_kernel(cpu_prefill.prefill, cpu_prefill.make_variant(variant))


@functools.cache
def _float_tensor(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)


def _float_address(value: float) -> int:
    """Where ``value`` lies as a float32; it stays there."""
    return _float_tensor(value).data_ptr()
