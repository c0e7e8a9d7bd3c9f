"""The inner loops of decode attention over 16 tokens, in LLVM: a key or value is loaded once for several query heads.

    queries (heads, d)    keys   (d, b)    scores (heads, row)    a vector runs over 16 tokens
    weights (heads, row)  values (16, d)   sums   (heads, d)      a vector runs over 16 elements of a head

Sums take two products at a time, of two elements of a head or of two tokens, one after the other: a head's numbers come
from that head alone, in the order in which prefill takes them too (cpu_prefill.py), and are the same bits. Meanwhile
other tokens are prefetched.

Legend: d head size, b tokens a page; both are multiples of 16. Queries, weights, keys and values are of the element's
dtype; scores and sums are float32. All operands are int64: addresses, counts, and ``row``, elements from one head's to
the next's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shardray.parallel.kernels import tile, vector
from shardray.parallel.kernels.tile import Operand
from shardray.parallel.kernels.vector import FLOAT, FLOATS, I32, I64, VECTOR_BYTES, WIDTH, WORDS

MAX_HEADS = 4  # at a time
_VECTORS = 4  # of sums of a head, in registers
_LINE_BYTES = 64


class PageElement(NamedTuple):
    """What keys and values are made of, and how two of them are multiplied and added to a sum."""

    name: str
    num_bytes: int
    spread: Callable[[Any, Any], Operand]  # (builder, address of two elements) -> what ``add`` takes
    load: Callable[[Any, Any, Any], Operand]  # (builder, two addresses of 16 elements) -> what ``add`` takes
    add: Callable[[Any, Any, Operand, Operand], Any]  # (builder, sums, spread, loaded) -> sums


def _spread_floats(builder: Any, address: Any) -> Operand:
    places = address, builder.add(address, I64(4))
    return tuple(vector.splat(builder, vector.load(builder, place, FLOAT)) for place in places)


def _load_floats(builder: Any, *addresses: Any) -> Operand:
    return tuple(vector.load_float32(builder, address) for address in addresses)


def _load_halves(builder: Any, *addresses: Any) -> Operand:
    return tuple(vector.load_bfloat16(builder, address) for address in addresses)


def _load_pairs(builder: Any, first: Any, second: Any) -> Operand:
    low, high = (vector.load(builder, address, vector.HALVES) for address in (first, second))
    order = [place for i in range(WIDTH) for place in (i, i + WIDTH)]
    pairs = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 2 * WIDTH), order))
    return (builder.bitcast(pairs, WORDS),)


def _bfloat16(name: str, dot: tile.Dot, load: Callable[[Any, Any, Any], Operand]) -> PageElement:
    def spread(builder: Any, address: Any) -> Operand:
        return dot.spread(builder, vector.load(builder, address, I32))

    return PageElement(name, 2, spread, load, dot.add)


FLOAT32 = PageElement("floats", 4, _spread_floats, _load_floats, tile.HALVES.add)
HALVES = _bfloat16("halves", tile.HALVES, _load_halves)  # bfloat16 on any processor
PAIRS = _bfloat16("pairs", tile.PAIRS, _load_pairs)  # and with AVX-512 that multiplies it


def make_score(element: PageElement) -> Any:
    """(heads, queries, d, b, two columns of keys, two places ahead, where their scores go (two), row)

    scores = queries . keys, of 16 tokens in each column, which lie in rows of b. Meanwhile 16 tokens are prefetched
    from each place ahead.
    """

    @intrinsic
    def score(
        typing_context: Any, num_heads: Any, queries: Any, head_dim: Any, block_size: Any, first: Any, second: Any,
        first_ahead: Any, second_ahead: Any, first_scores: Any, second_scores: Any, row_len: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            num_heads, queries, head_dim, block_size, *places, row_len = operands
            shape = queries, head_dim, block_size, row_len
            heads = range(1, MAX_HEADS + 1)
            vector.choose(builder, num_heads, heads, lambda count: _score(builder, element, count, *shape, *places))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return score


def _score(
    builder: Any, element: PageElement, num_heads: int, queries: Any, head_dim: Any, block_size: Any, row_len: Any,
    first: Any, second: Any, first_ahead: Any, second_ahead: Any, first_scores: Any, second_scores: Any,
) -> None:  # fmt: skip
    zeros, num_bytes = FLOATS([0.0] * WIDTH), element.num_bytes
    row_bytes, pair_bytes = vector.offset(builder, I64(0), block_size, num_bytes), 2 * WIDTH * num_bytes
    totals = [[vector.register(builder, zeros) for _ in range(num_heads)] for _ in range(2)]
    with vector.loop(builder, builder.udiv(head_dim, I64(2))) as pair:
        keys = []
        for column, ahead in ((first, first_ahead), (second, second_ahead)):
            _prefetch(builder, vector.offset(builder, ahead, pair, pair_bytes), pair_bytes)
            row = builder.add(column, builder.mul(builder.mul(pair, I64(2)), row_bytes))
            keys.append(element.load(builder, row, builder.add(row, row_bytes)))
        for h in range(num_heads):
            at = builder.add(builder.mul(head_dim, I64(h)), builder.mul(pair, I64(2)))
            query = element.spread(builder, vector.offset(builder, queries, at, num_bytes))
            for key, of_column in zip(keys, totals, strict=True):
                builder.store(element.add(builder, builder.load(of_column[h]), query, key), of_column[h])
    for of_column, scores in zip(totals, (first_scores, second_scores), strict=True):
        for h, total in enumerate(of_column):
            place = vector.offset(builder, scores, builder.mul(row_len, I64(h)), 4)
            vector.store(builder, builder.load(total), place)


def _prefetch(builder: Any, address: Any, num_bytes: int) -> None:
    for line in range(0, num_bytes, _LINE_BYTES):
        vector.prefetch(builder, builder.add(address, I64(line)))


def make_accumulate(element: PageElement) -> Any:
    """(heads, weights, row, values, ahead, tokens, d, sums): sums += weights @ values of the first tokens

    If their number is odd, the weight behind the last one has to be 0. Meanwhile as many tokens at ``ahead`` are
    prefetched.
    """

    @intrinsic
    def accumulate(
        typing_context: Any, num_heads: Any, weights: Any, row_len: Any, values: Any, ahead: Any, num_tokens: Any,
        head_dim: Any, sums: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            num_heads, *rest = operands
            heads = range(1, MAX_HEADS + 1)
            vector.choose(builder, num_heads, heads, lambda count: _accumulate(builder, element, count, *rest))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return accumulate


def _accumulate(
    builder: Any, element: PageElement, num_heads: int, weights: Any, row_len: Any, values: Any, ahead: Any,
    num_tokens: Any, head_dim: Any, sums: Any,
) -> None:  # fmt: skip
    num_bytes = element.num_bytes
    num_pairs = builder.udiv(builder.add(num_tokens, I64(1)), I64(2))
    last = builder.sub(num_tokens, I64(1))

    def columns(first: Any, num_vectors: int) -> None:
        """``num_vectors`` vectors of every head from element ``first`` on"""
        at = vector.offset(builder, sums, first, 4)
        rows = [vector.offset(builder, at, head_dim, 4 * h) for h in range(num_heads)]
        places = [builder.add(row, I64(v * VECTOR_BYTES)) for row in rows for v in range(num_vectors)]
        totals = [vector.register(builder, vector.load(builder, place, FLOATS)) for place in places]
        with vector.loop(builder, num_pairs) as pair:
            token = builder.mul(pair, I64(2))
            following = builder.add(token, I64(1))
            inside = builder.icmp_unsigned("<", token, last)
            read = token, builder.select(inside, following, token)  # never what is not filled: it may be NaN
            for each in (token, following):
                place = vector.offset(builder, ahead, builder.add(builder.mul(each, head_dim), first), num_bytes)
                _prefetch(builder, place, num_vectors * WIDTH * num_bytes)
            starts = [
                vector.offset(builder, values, builder.add(builder.mul(each, head_dim), first), num_bytes)
                for each in read
            ]
            loaded = [
                element.load(builder, *(builder.add(start, I64(v * WIDTH * num_bytes)) for start in starts))
                for v in range(num_vectors)
            ]
            for h in range(num_heads):
                place = builder.add(builder.mul(row_len, I64(h)), token)
                weight = element.spread(builder, vector.offset(builder, weights, place, num_bytes))
                for value, total in zip(loaded, totals[h * num_vectors :], strict=False):
                    builder.store(element.add(builder, builder.load(total), weight, value), total)
        for place, total in zip(places, totals, strict=True):
            vector.store(builder, builder.load(total), place)

    wide = _VECTORS * WIDTH
    num_wide = builder.udiv(head_dim, I64(wide))
    with vector.loop(builder, num_wide) as index:
        columns(builder.mul(index, I64(wide)), _VECTORS)
    rest = builder.mul(num_wide, I64(wide))
    with vector.loop(builder, builder.udiv(builder.sub(head_dim, rest), I64(WIDTH))) as index:
        columns(vector.offset(builder, rest, index, WIDTH), 1)
