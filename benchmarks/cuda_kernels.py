"""Times the kernels for CUDA one by one, beside the bytes that each has to move: one JSON line a measurement.

    python -m benchmarks.cuda_kernels

Needs a CUDA device, and takes about a minute. Weights and pages are taken in turns out of more than the L2 cache holds.
What docs/decisions/2026-11-29-triton-kernels.md predicts for an H200 stands there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.kernels import triton_linear
from shardray.runtime.model.attention import AttentionRow, AttentionTasks, KVPages, OwnHeads, PagedAttention, StepView
from shardray.runtime.model.kernels.ops import NormWeights
from shardray.runtime.model.kernels.splits import decode_splits, prefill_tiles
from shardray.runtime.model.kernels.triton_ops import TritonOps
from shardray.runtime.model.spec import Attention, Norm

DEVICE = torch.device("cuda")
COLD_BYTES = 512 << 20  # several times an L2 cache
TURNS = 20
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28_672, 4096), "down": (4096, 14_336)}
SHAPES = LLAMA_8B | {"head": (128_256, 4096), "small qkv": (960, 576), "small down": (576, 1536)}


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, in a graph of them all; the best of some rounds."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(TURNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1000 / len(calls))
    return min(times)


def report(kernel: str, shape: str, calls: Sequence[Callable[[], object]], num_bytes: int, flops: int = 0) -> None:
    took_us = time_us(calls)
    figures = {"us": round(took_us, 2), "gb_per_s": round(num_bytes / took_us / 1000)}
    if flops:
        figures["tflop_per_s"] = round(flops / took_us / 1e6)
    print(json.dumps({"kernel": kernel, "shape": shape, "bytes": num_bytes} | figures), flush=True)


def copies(num_bytes: int) -> range:
    return range(max(4, min(200, COLD_BYTES // num_bytes)))


def copy() -> None:
    """What the others are held against."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    report("copy", "1 GiB", [partial(source.clone)], 2 * source.numel())


def products() -> None:
    for name, (num_outputs, num_inputs) in SHAPES.items():
        num_bytes = 2 * num_outputs * num_inputs
        weights = [torch.randn(num_outputs, num_inputs, device=DEVICE).bfloat16() for _ in copies(num_bytes)]
        for num_tokens in (1, 4):
            x = torch.randn(num_tokens, num_inputs, device=DEVICE).bfloat16()
            shape = f"{name}, {num_tokens} x {num_outputs} x {num_inputs}"
            ours = [partial(triton_linear.multiply, x, weight, None, torch.bfloat16) for weight in weights]
            report("narrow_linear", shape, ours, num_bytes)
            report("F.linear", shape, [partial(F.linear, x, weight) for weight in weights], num_bytes)


def step(counts: list[int], lens: list[int], num_blocks: int) -> StepView:
    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(DEVICE)

    many, num_decodes = np.array(counts), counts.count(1)
    splits, split_starts = decode_splits(np.array(lens[:num_decodes], dtype=np.int64))
    starts = np.append(0, np.cumsum(many)).astype(np.int32)
    tokens = torch.zeros(sum(counts), dtype=torch.int64, device=DEVICE)
    tables = torch.randperm(len(counts) * num_blocks, device=DEVICE).view(len(counts), num_blocks).int()
    rows = tuple(AttentionRow(i, int(starts[i]), counts[i], lens[i]) for i in range(num_decodes, len(counts)))
    tasks = AttentionTasks(*map(put, (splits, split_starts, prefill_tiles(many, num_decodes), starts)))
    return StepView(
        tokens, tokens, tokens, num_decodes, tables, put(np.array(lens, dtype=np.int32)), rows, tokens, tasks=tasks
    )


def attention() -> None:
    spec = Attention(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
    kv_of_head = tuple(head // (HEADS // KV_HEADS) for head in range(HEADS))
    paged = PagedAttention(spec, OwnHeads(kv_of_head, 0, HEADS), DEVICE)
    for num_rows, num_tokens, context_len in (
        (1, 1, 1024), (1, 1, 8192), (1, 1, 131_072), (32, 1, 1024), (32, 1, 8192), (128, 1, 2048),
        (1, 2048, 2048), (1, 2048, 32_768), (16, 128, 1024),
    ):  # fmt: skip
        num_blocks = -(-context_len // BLOCK_SIZE)
        num_bytes = 4 * num_rows * context_len * KV_HEADS * HEAD_DIM
        view = step([num_tokens] * num_rows, [context_len] * num_rows, num_blocks)
        num_layers = len(copies(num_bytes)) if num_bytes < COLD_BYTES else 1
        pages = KVPages(num_layers, num_rows * num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.bfloat16, DEVICE)
        pages.keys.normal_()
        pages.values.normal_()
        queries = torch.randn(num_rows * num_tokens, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        calls = [partial(TritonOps().attend, paged, queries, pages, layer, view) for layer in range(num_layers)]
        seen = num_tokens * (2 * context_len - num_tokens + 1) // 2  # pairs of query and key
        flops = 0 if num_tokens == 1 else 4 * num_rows * seen * HEADS * HEAD_DIM
        report("attend", f"{num_rows} x {num_tokens} of {context_len}", calls, num_bytes, flops)


def elementwise() -> None:
    ops = TritonOps()
    norm = NormWeights(Norm("rms", 1e-5), torch.ones(4096, device=DEVICE), None)
    for num_tokens in (1, 2048):
        x, delta = (torch.randn(num_tokens, 4096, device=DEVICE).bfloat16() for _ in range(2))
        report("add_norm", f"{num_tokens} x 4096", [partial(ops.add_norm, norm, x, delta)] * 20, 8 * x.numel())
        inner = torch.randn(num_tokens, 28_672, device=DEVICE).bfloat16()
        calls = [partial(ops.activate, inner, "silu", True)] * 20
        report("activate", f"{num_tokens} x 28672", calls, 3 * inner.numel())


if __name__ == "__main__":
    with torch.inference_mode():
        copy()
        elementwise()
        attention()
        products()
