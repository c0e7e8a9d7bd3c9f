"""The inner loops of decode attention over one page, in LLVM: a key or value is loaded once for several query heads.

    queries (heads, d)    keys   (d, b)    scores (heads, row)    a vector runs over 16 tokens
    weights (heads, row)  values (b, d)    sums   (heads, d)      a vector runs over 16 elements of a head

Meanwhile the next page is prefetched. A head's numbers come from that head alone, in the same order whatever its
neighbours are.

Legend: d head size, b tokens a page, row a multiple of b; d and b are multiples of 16. Keys and values are of the
element's dtype, the rest is float32. All operands are int64: addresses, counts, and ``row``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from shardray.parallel.kernels import vector
from shardray.parallel.kernels.vector import FLOAT, FLOATS, I64, VECTOR_BYTES, WIDTH

MAX_HEADS = 4  # at a time
_VECTORS = 4  # of sums of a head, in registers


class PageElement(NamedTuple):
    """What keys and values are made of."""

    num_bytes: int
    load: Callable[[Any, Any], Any]  # (builder, address) -> 16 floats


BFLOAT16 = PageElement(2, vector.load_bfloat16)
FLOAT32 = PageElement(4, vector.load_float32)


def make_score_page(element: PageElement) -> Any:
    """(heads, queries, d, keys, next keys, b, scores, row): scores = queries . keys, of all places, filled or not"""

    @intrinsic
    def score_page(
        typing_context: Any, num_heads: Any, queries: Any, head_dim: Any, keys: Any, following: Any, block_size: Any,
        scores: Any, row_len: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            num_heads, *rest = operands
            heads = range(1, MAX_HEADS + 1)
            vector.choose(builder, num_heads, heads, lambda count: _score(builder, element, count, *rest))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return score_page


def _score(
    builder: Any, element: PageElement, num_heads: int, queries: Any, head_dim: Any, keys: Any, following: Any,
    block_size: Any, scores: Any, row_len: Any,
) -> None:  # fmt: skip
    zeros = FLOATS([0.0] * WIDTH)
    with vector.loop(builder, builder.udiv(block_size, I64(WIDTH))) as index:
        first = builder.mul(index, I64(WIDTH))
        totals = [[vector.register(builder, zeros) for _ in range(2)] for _ in range(num_heads)]  # for even and odd d
        with vector.loop(builder, builder.udiv(head_dim, I64(2))) as pair:
            for odd in range(2):
                place = vector.offset(builder, I64(odd), pair, 2)
                row = builder.add(builder.mul(place, block_size), first)
                vector.prefetch(builder, vector.offset(builder, following, row, element.num_bytes))
                key = element.load(builder, vector.offset(builder, keys, row, element.num_bytes))
                for h in range(num_heads):
                    at = builder.add(builder.mul(head_dim, I64(h)), place)
                    query = vector.splat(builder, vector.load(builder, vector.offset(builder, queries, at, 4), FLOAT))
                    total = totals[h][odd]
                    builder.store(vector.multiply_add(builder, query, key, builder.load(total)), total)
        for h, (even, odd_total) in enumerate(totals):
            at = builder.add(builder.mul(row_len, I64(h)), first)
            total = builder.fadd(builder.load(even), builder.load(odd_total))
            vector.store(builder, total, vector.offset(builder, scores, at, 4))


def make_accumulate_page(element: PageElement) -> Any:
    """(heads, weights, row, values, next values, tokens, d, sums): sums += weights @ values of the first tokens"""

    @intrinsic
    def accumulate_page(
        typing_context: Any, num_heads: Any, weights: Any, row_len: Any, values: Any, following: Any, num_tokens: Any,
        head_dim: Any, sums: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            num_heads, *rest = operands
            heads = range(1, MAX_HEADS + 1)
            vector.choose(builder, num_heads, heads, lambda count: _accumulate(builder, element, count, *rest))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return accumulate_page


def _accumulate(
    builder: Any, element: PageElement, num_heads: int, weights: Any, row_len: Any, values: Any, following: Any,
    num_tokens: Any, head_dim: Any, sums: Any,
) -> None:  # fmt: skip
    def columns(first: Any, num_vectors: int) -> None:
        """``num_vectors`` vectors of every head from element ``first`` on"""
        at = vector.offset(builder, sums, first, 4)
        rows = [vector.offset(builder, at, head_dim, 4 * h) for h in range(num_heads)]
        places = [builder.add(row, I64(v * VECTOR_BYTES)) for row in rows for v in range(num_vectors)]
        totals = [vector.register(builder, vector.load(builder, place, FLOATS)) for place in places]
        with vector.loop(builder, num_tokens) as token:
            row = builder.add(builder.mul(token, head_dim), first)
            loaded = []
            for v in range(num_vectors):
                place = builder.add(row, I64(v * WIDTH))
                vector.prefetch(builder, vector.offset(builder, following, place, element.num_bytes))
                loaded.append(element.load(builder, vector.offset(builder, values, place, element.num_bytes)))
            for h in range(num_heads):
                place = builder.add(builder.mul(row_len, I64(h)), token)
                weight = vector.splat(builder, vector.load(builder, vector.offset(builder, weights, place, 4), FLOAT))
                for value, total in zip(loaded, totals[h * num_vectors :], strict=False):
                    builder.store(vector.multiply_add(builder, weight, value, builder.load(total)), total)
        for place, total in zip(places, totals, strict=True):
            vector.store(builder, builder.load(total), place)

    wide = _VECTORS * WIDTH
    num_wide = builder.udiv(head_dim, I64(wide))
    with vector.loop(builder, num_wide) as index:
        columns(builder.mul(index, I64(wide)), _VECTORS)
    rest = builder.mul(num_wide, I64(wide))
    with vector.loop(builder, builder.udiv(builder.sub(head_dim, rest), I64(WIDTH))) as index:
        columns(vector.offset(builder, rest, index, WIDTH), 1)
