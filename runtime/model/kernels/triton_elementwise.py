"""What stands between the matrix products of a layer, one kernel each, on CUDA.

Legend: T tokens, H hidden size, F FFN columns of this rank, n / g query and KV heads, d head size, b tokens a page.
Norm weights, angles and everything computed are float32; activations are of the model's dtype.
"""

# mypy: ignore-errors
# (Triton's dialect: pointers and tiles)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def enter(EARLY: tl.constexpr):
    """What a kernel does before it reads what another has written: see EARLY_LAUNCH."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def add_norm(
    x, delta, weight, bias, out, size, eps, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_RMS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x (T, H) += delta (T, H); out = norm(x). A program takes a token."""
    enter(EARLY)
    place = tl.arange(0, BLOCK)
    there = place < size
    first = tl.program_id(0).to(tl.int64) * size
    row = tl.load(x + first + place, there, 0.0).to(tl.float32)
    if HAS_DELTA:
        row += tl.load(delta + first + place, there, 0.0).to(tl.float32)
        rounded = row.to(x.dtype.element_ty)
        tl.store(x + first + place, rounded, there)
        row = rounded.to(tl.float32)  # so that fused and unfused agree
    if not IS_RMS:
        row = tl.where(there, row - tl.sum(row) / size, 0.0)
    row *= tl.rsqrt(tl.sum(row * row) / size + eps)
    if HAS_WEIGHT:
        row *= tl.load(weight + place, there, 0.0)
    if HAS_BIAS:
        row += tl.load(bias + place, there, 0.0)
    tl.store(out + first + place, row.to(out.dtype.element_ty), there)


@triton.jit
def rotate_and_store(
    qkv, cos, sin, cache_index, keys, values, num_heads, num_kv_heads, first_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Queries of qkv (T, n + 2 g, d) are rotated where they are, keys into their pages; values are copied into theirs.

    The first 2 HALF elements of a head are rotated, by angles (T, HALF). A program takes HEADS heads of a token, from
    ``first_head`` on. Pages are (P, g, b, d).
    """
    enter(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = first_head + tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = is_value & (head < num_heads + 2 * num_kv_heads)
    slot = tl.load(cache_index + token)
    source = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * D
    kv_head = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads)
    target = ((slot // PAGE * num_kv_heads + kv_head) * PAGE + slot % PAGE) * D
    if HALF > 0:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        low_at = 2 * pair if INTERLEAVED else pair
        high_at = 2 * pair + 1 if INTERLEAVED else pair + HALF
        turned = (is_query | is_key) & (pair < HALF)
        c = tl.load(cos + token * HALF + pair, pair < HALF, 0.0)
        s = tl.load(sin + token * HALF + pair, pair < HALF, 0.0)
        low = tl.load(source + low_at, turned, 0.0).to(tl.float32)
        high = tl.load(source + high_at, turned, 0.0).to(tl.float32)
        new_low, new_high = (
            (low * c - high * s).to(keys.dtype.element_ty),
            (high * c + low * s).to(keys.dtype.element_ty),
        )
        tl.store(source + low_at, new_low, turned & is_query)
        tl.store(source + high_at, new_high, turned & is_query)
        tl.store(keys + target + low_at, new_low, turned & is_key)
        tl.store(keys + target + high_at, new_high, turned & is_key)
    place = tl.arange(0, BLOCK_D)[None, :]
    as_they_are = (is_key & (place >= 2 * HALF) | is_value) & (place < D)
    plain = tl.load(source + place, as_they_are, 0.0)
    tl.store(keys + target + place, plain, as_they_are & is_key)
    tl.store(values + target + place, plain, as_they_are & is_value)


@triton.jit
def _activation(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(y)) / 2 = sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif KIND == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(KIND == "relu2")
        x = tl.maximum(x, 0.0)
        return x * x


@triton.jit
def activate(inner, out, size, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """out (T, F) = act(inner (T, F)), or GATED: act(first half) * second half of inner (T, 2 F)."""
    enter(EARLY)
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    if GATED:
        gate = tl.load(inner + token * 2 * size + place, there, 0.0).to(tl.float32)
        up = tl.load(inner + token * 2 * size + size + place, there, 0.0).to(tl.float32)
        if KIND == "clamped_swiglu":
            gate, up = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
            result = (up + 1.0) * _activation(gate, "quick_gelu")
        else:
            result = _activation(gate, KIND) * up
    else:
        result = _activation(tl.load(inner + token * size + place, there, 0.0).to(tl.float32), KIND)
    tl.store(out + token * size + place, result.to(out.dtype.element_ty), there)
