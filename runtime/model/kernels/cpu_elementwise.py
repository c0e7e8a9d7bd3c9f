"""What stands between the matrix products of a layer, fused into one pass each, on CPUs.

A task is a few tokens that follow one another: their memory is then read in one stream. More of them where keys are
stored, so that threads seldom write to the same lines of a page.

Legend: T tokens, H hidden size, F FFN columns of this rank, n / g query and KV heads, d head size. Norm weights, angles
and everything computed are float32; activations are of the element's dtype.
"""

# mypy: ignore-errors
# (numba's dialect: pointers, fixed-width scalars, names bound when a kernel is compiled)

from __future__ import annotations

import numba
import numpy as np

from shardray.parallel.kernels import jit
from shardray.parallel.kernels.jit import FLOAT32

_TOKENS_A_TASK = 8
_KEYS_A_TASK = 16

_, pointer, load, store = FLOAT32  # replaced by those of the element a kernel is compiled for


@numba.njit(inline="always")
def _take_tokens(args, num_tokens, count):
    """The next task's tokens, [first, end); none are left when they begin behind the last"""
    first = jit.take_task(args) * count
    return first, min(first + count, num_tokens)


def add(args):
    """args: T, H, x (T, H), delta (T, H), out (T, H).  out = x + delta"""
    a = numba.carray(args, (6,))
    num_tokens, size = a[1], a[2]
    x, delta, out = pointer(a[3]), pointer(a[4]), pointer(a[5])
    words, more_words = np.empty(size, np.uint32), np.empty(size, np.uint32)
    row, more = words.view(np.float32), more_words.view(np.float32)
    while True:
        first, end = _take_tokens(args, num_tokens, _TOKENS_A_TASK)
        if first >= num_tokens:
            break
        for token in range(first, end):
            load(x, token * size, size, words)
            load(delta, token * size, size, more_words)
            for i in range(size):
                row[i] += more[i]
            store(words, size, out, token * size)


def add_rms_norm(args):
    """args: T, H, x (T, H), delta (T, H) or 0, weight (H,), address of eps, out (T, H).  x += delta; out = norm(x)"""
    a = numba.carray(args, (8,))
    num_tokens, size = a[1], a[2]
    x, delta, out = pointer(a[3]), pointer(a[4]), pointer(a[7])
    weight, eps = jit.pointer_f32(a[5]), jit.pointer_f32(a[6])[0]
    words, more_words = np.empty(size, np.uint32), np.empty(size, np.uint32)
    row, more = words.view(np.float32), more_words.view(np.float32)
    while True:
        first, end = _take_tokens(args, num_tokens, _TOKENS_A_TASK)
        if first >= num_tokens:
            break
        for token in range(first, end):
            load(x, token * size, size, words)
            if a[4] != 0:
                load(delta, token * size, size, more_words)
                for i in range(size):
                    row[i] += more[i]
                store(words, size, x, token * size)
                load(x, token * size, size, words)  # as rounded, so that fused and unfused agree
            total = np.float32(0.0)
            for i in range(size):
                total += row[i] * row[i]
            inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
            for i in range(size):
                row[i] = row[i] * inverse * weight[i]
            store(words, size, out, token * size)


def rotate_and_store(args):
    """args: T, n, g, d, half, b, qkv (T, n + 2 g, d), cos (T, half), sin (T, half), cache index (T,), keys, values

    Queries are rotated where they are; keys are rotated into their pages, values copied into theirs.
    """
    a = numba.carray(args, (13,))
    num_tokens, num_heads, num_kv_heads, head_dim, half, block_size = a[1], a[2], a[3], a[4], a[5], a[6]
    qkv, cos, sin = pointer(a[7]), jit.pointer_f32(a[8]), jit.pointer_f32(a[9])
    cache_index, keys, values = jit.pointer_i64(a[10]), pointer(a[11]), pointer(a[12])
    words = np.empty(head_dim, np.uint32)
    head = words.view(np.float32)
    while True:
        first, end = _take_tokens(args, num_tokens, _KEYS_A_TASK)
        if first >= num_tokens:
            break
        for token in range(first, end):
            row = token * (num_heads + 2 * num_kv_heads) * head_dim
            page, offset = cache_index[token] // block_size, cache_index[token] % block_size
            tile = block_size * head_dim
            for i in range(num_heads + num_kv_heads):
                load(qkv, row + i * head_dim, head_dim, words)
                for j in range(half):
                    c, s = cos[token * half + j], sin[token * half + j]
                    low, high = head[j], head[half + j]
                    head[j] = low * c - high * s
                    head[half + j] = high * c + low * s
                if i < num_heads:
                    store(words, head_dim, qkv, row + i * head_dim)
                else:  # a key is a column of its page's (d, b) tile
                    column = (page * num_kv_heads + i - num_heads) * tile + offset
                    for j in range(head_dim):
                        store(words[j:], 1, keys, column + j * block_size)
            for i in range(num_kv_heads):
                start = row + (num_heads + num_kv_heads + i) * head_dim
                place = (page * num_kv_heads + i) * tile + offset * head_dim
                for j in range(head_dim):
                    values[place + j] = qkv[start + j]


def silu_gate(args):
    """args: T, F, gate_up (T, 2 F), out (T, F).  out = silu(gate) * up"""
    a = numba.carray(args, (5,))
    num_tokens, size = a[1], a[2]
    gate_up, out = pointer(a[3]), pointer(a[4])
    gate_words, up_words = np.empty(size, np.uint32), np.empty(size, np.uint32)
    gate, up = gate_words.view(np.float32), up_words.view(np.float32)
    while True:
        first, end = _take_tokens(args, num_tokens, _TOKENS_A_TASK)
        if first >= num_tokens:
            break
        for token in range(first, end):
            load(gate_up, token * 2 * size, size, gate_words)
            load(gate_up, token * 2 * size + size, size, up_words)
            for i in range(size):
                power = jit.exp(min(-gate[i], np.float32(80.0)))
                gate[i] = gate[i] / (np.float32(1.0) + power) * up[i]
            store(gate_words, size, out, token * size)
