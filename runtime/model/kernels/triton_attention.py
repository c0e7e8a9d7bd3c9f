"""Attention that reads the pages in place, on CUDA: decodes in splits of their contexts, chunks of prompts in tiles.

Both go over keys and values in blocks of tokens and keep a running softmax (arXiv 2205.14135), in float32, to the base
of 2. A block's place depends on the sequence alone, and blocks that a query does not see leave its sums as they are,
bit by bit; so a row's result is the same whoever shares the batch, and a prompt's whatever chunks it comes in.

Legend: T tokens, R rows, D decode rows, W splits, n / g query and KV heads, d head size, P pages, b tokens a page.
Pages are (P, g, b, d). ``scale`` and SOFTCAP are in units of the base-2 exponent.
"""

# mypy: ignore-errors
# (Triton's dialect: pointers and tiles)

from __future__ import annotations

import triton
import triton.language as tl

from shardray.runtime.model.kernels.triton_elementwise import enter

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_block(
    keys, values, tables, row, table_stride, token, there, place, is_place, kv_head, page_heads, PAGE: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Keys (d, tokens) and values (tokens, d) of tokens of a row; zeros for those that are not ``there``."""
    page = tl.load(tables + row.to(tl.int64) * table_stride + token // PAGE, there, 0).to(tl.int64)
    at = ((page * page_heads + kv_head) * PAGE + token % PAGE) * D
    key = tl.load(keys + at[None, :] + place[:, None], there[None, :] & is_place[:, None], 0.0)
    value = tl.load(values + at[:, None] + place[None, :], there[:, None] & is_place[None, :], 0.0)
    return key, value


@triton.jit
def _scores(
    dots, head, distance, seen, bias, scale, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, FURTHEST: tl.constexpr
):  # fmt: skip
    """What the softmax is taken of; -inf where nothing is seen.

    BIAS: "slopes", one a head that falls with distance, or "table", (n, 2 FURTHEST + 1) by distance from -FURTHEST on.
    """
    scores = dots * scale
    if SOFTCAP > 0.0:  # tanh(y) = 2 sigmoid(2 y) - 1
        scores = SOFTCAP * (2.0 * tl.sigmoid(scores * (2.0 / SOFTCAP)) - 1.0)
    if BIAS == "slopes":
        scores -= tl.load(bias + head) * LOG2_E * distance.to(tl.float32)
    elif BIAS == "table":
        place = tl.minimum(tl.maximum(distance, -FURTHEST), FURTHEST) + FURTHEST
        scores += tl.load(bias + head * (2 * FURTHEST + 1) + place) * LOG2_E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _add_block(scores, values, highest, total, sums, PRECISION: tl.constexpr):
    """Take a block into the running softmax of each query: its highest score, the weights' sum, the weighted values."""
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a query that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    fading = tl.exp2(highest - base)
    total = total * fading + tl.sum(weights, 1)
    sums = tl.dot(weights.to(values.dtype), values, sums * fading[:, None], input_precision=PRECISION)
    return new_highest, total, sums


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def decode(
    queries, keys, values, tables, context_lens, splits, split_starts, groups, bias, partial_sums, partial_stats,
    num_rows, num_heads, num_kv_heads, page_heads, query_stride, table_stride, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, FURTHEST: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Each split of each decode, for the query heads [groups[i], groups[i + 1]) of each KV head i.

    Gives partial_sums (W, n, d) and partial_stats (W, n, 2), highest score and sum of weights; nothing for splits that
    lie before the window. A program takes every num_programs-th of the W g tasks.
    """
    enter(EARLY)
    num_tasks = tl.load(split_starts + num_rows) * num_kv_heads
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        split, kv_head = task // num_kv_heads, task % num_kv_heads
        row, index = tl.load(splits + 2 * split), tl.load(splits + 2 * split + 1)
        context_len = tl.load(context_lens + row)
        first_head, next_head = tl.load(groups + kv_head).to(tl.int32), tl.load(groups + kv_head + 1).to(tl.int32)
        begin, end = index * SPLIT, tl.minimum(index * SPLIT + SPLIT, context_len)
        if WINDOW > 0:
            begin = tl.maximum(begin, (context_len - WINDOW) // BLOCK_N * BLOCK_N)
        if (begin < end) & (first_head < next_head):
            head = first_head + tl.arange(0, BLOCK_H)[:, None]
            is_head = head < next_head
            place = tl.arange(0, BLOCK_D)
            is_place = place < D
            query = tl.load(
                queries + row.to(tl.int64) * query_stride + head * D + place[None, :], is_head & is_place[None, :], 0.0
            )
            highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_H,), tl.float32)
            sums = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
            for start in range(begin, end, BLOCK_N):
                token = start + tl.arange(0, BLOCK_N)
                there = token < end
                key, value = _load_block(
                    keys, values, tables, row, table_stride, token, there, place, is_place, kv_head, page_heads, PAGE, D
                )
                distance = context_len - 1 - token[None, :]
                seen = there[None, :]
                if WINDOW > 0:
                    seen = seen & (distance < WINDOW)
                dots = tl.dot(query, key, input_precision=PRECISION)
                scores = _scores(
                    dots, tl.minimum(head, num_heads - 1), distance, seen, bias, scale, SOFTCAP, BIAS, FURTHEST
                )
                highest, total, sums = _add_block(scores, value, highest, total, sums, PRECISION)
            at = split.to(tl.int64) * num_heads + head
            tl.store(partial_sums + at * D + place[None, :], sums, is_head & is_place[None, :])
            tl.store(partial_stats + at * 2, highest[:, None], is_head)
            tl.store(partial_stats + at * 2 + 1, total[:, None], is_head)


@triton.jit
def combine(
    partial_sums, partial_stats, split_starts, context_lens, sinks, out, num_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out (D, n, d): the splits of a row, from its first on; zeros if it has none. A program takes a head of a row."""
    enter(EARLY)
    row, head = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(split_starts + row), tl.load(split_starts + row + 1)
    if WINDOW > 0:
        first += tl.maximum(0, (tl.load(context_lens + row) - WINDOW) // BLOCK_N * BLOCK_N) // SPLIT
    place = tl.arange(0, BLOCK_D)
    is_place = place < D
    highest, total = float("-inf"), 0.0
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        there = split < end
        at = split.to(tl.int64) * num_heads + head
        highs = tl.load(partial_stats + at * 2, there, float("-inf"))
        totals = tl.load(partial_stats + at * 2 + 1, there, 0.0)
        parts = tl.load(partial_sums + at[:, None] * D + place[None, :], there[:, None] & is_place[None, :], 0.0)
        new_highest = tl.maximum(highest, tl.max(highs, 0))
        weights, fading = tl.exp2(highs - new_highest), tl.exp2(highest - new_highest)
        total = total * fading + tl.sum(weights * totals, 0)
        sums = sums * fading + tl.sum(weights[:, None] * parts, 0)
        highest = new_highest
    if HAS_SINKS:
        sink = tl.load(sinks + head) * LOG2_E
        new_highest = tl.maximum(highest, sink)
        fading = tl.exp2(highest - new_highest)
        total, sums = total * fading + tl.exp2(sink - new_highest), sums * fading
    sums = sums / tl.where(total > 0.0, total, 1.0)
    at = (row.to(tl.int64) * num_heads + head) * D
    tl.store(out + at + place, sums.to(out.dtype.element_ty), is_place)


@triton.jit(do_not_specialize=["table_stride"])
def prefill(
    queries, keys, values, tables, context_lens, query_starts, tiles, kv_of_head, bias, sinks, out,
    num_heads, page_heads, query_stride, table_stride, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    FURTHEST: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Rows of several tokens, the last of their contexts, into out (T, n, d). A program takes BLOCK_M of a head."""
    enter(EARLY)
    head = tl.program_id(0)
    tile, part = tl.program_id(1) // (TILE // BLOCK_M), tl.program_id(1) % (TILE // BLOCK_M)
    row, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1) + part * BLOCK_M
    start_of_row = tl.load(query_starts + row)
    num_tokens = tl.load(query_starts + row + 1) - start_of_row
    if first < num_tokens:
        context_len = tl.load(context_lens + row)
        kv_head = tl.load(kv_of_head + head)
        index = first + tl.arange(0, BLOCK_M)
        position = (context_len - num_tokens + index)[:, None]
        place = tl.arange(0, BLOCK_D)
        is_place = place < D
        is_query = (index < num_tokens)[:, None] & is_place[None, :]
        token_of_step = (start_of_row + index).to(tl.int64)[:, None]
        query = tl.load(queries + token_of_step * query_stride + head * D + place[None, :], is_query, 0.0)
        begin, end = 0, context_len
        furthest = context_len - num_tokens + tl.minimum(first + BLOCK_M, num_tokens)  # the end of what queries are
        if CAUSAL:
            end = furthest
        if WINDOW > 0:
            begin = tl.maximum(0, context_len - num_tokens + first - WINDOW + 1) // BLOCK_N * BLOCK_N
            end = tl.minimum(end, furthest + WINDOW - 1)
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(begin, end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            there = token < end
            key, value = _load_block(
                keys, values, tables, row, table_stride, token, there, place, is_place, kv_head, page_heads, PAGE, D
            )
            distance = position - token[None, :]
            seen = there[None, :]
            if CAUSAL:
                seen = seen & (distance >= 0)
            if WINDOW > 0:
                seen = seen & (tl.abs(distance) < WINDOW)
            dots = tl.dot(query, key, input_precision=PRECISION)
            scores = _scores(dots, head, distance, seen, bias, scale, SOFTCAP, BIAS, FURTHEST)
            highest, total, sums = _add_block(scores, value, highest, total, sums, PRECISION)
        if HAS_SINKS:
            sink = tl.load(sinks + head) * LOG2_E
            new_highest = tl.maximum(highest, sink)
            fading = tl.exp2(highest - new_highest)
            total, sums = total * fading + tl.exp2(sink - new_highest), sums * fading[:, None]
        sums = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        at = (token_of_step * num_heads + head) * D + place[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), is_query)
