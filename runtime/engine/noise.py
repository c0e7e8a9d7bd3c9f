"""Sampling noise as a pure function of (seed, position, token id).

There is no generator and no state, so a request draws the same noise whoever shares its batch, on whatever device, and
after any interruption. Integer arithmetic only, up to the last step: the bits are the same on CPU and CUDA.

The (seed, position) pair is mixed into a 64-bit key with the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014; the multipliers are Stafford's "Mix13"). The key's two halves
enter the 32-bit permutation ``lowbias32`` (Wellons, "Prospecting for hash functions", 2018), one before its first
multiplication and one after, so that two keys never give shifted copies of one sequence. The token id comes in already
permuted once by lowbias32, which a table does once for the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardray.runtime.engine.inputs import to_device

_MASK_64 = 2**64 - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
LOWBIAS_1 = 0x7FEB352D
LOWBIAS_2 = 0x846CA68B - 2**32  # as a signed 32-bit integer
UNIT = 2.0**-31 * (1.0 - 2.0**-24)  # brings 31 bits, which float32 may round up to 2**31, below 1


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Two signed 32-bit words for the token at ``position``, its index in prompt + output."""
    # The seed is mixed before the position is added, so neighbouring seeds are not shifted copies of each other.
    key = _mix64((_mix64(seed + _GOLDEN_64) + (position + 1) * _GOLDEN_64) & _MASK_64)
    return _signed(key >> 32), _signed(key & 0xFFFFFFFF)


def hash_token_ids(token_ids: torch.Tensor) -> torch.Tensor:
    """lowbias32 of each id: int32, the shape of ``token_ids``."""
    hashed = token_ids.to(torch.int32, copy=True)
    return _permute(hashed, None)


def exponential_noise(keys: Sequence[tuple[int, int]], hashed_ids: torch.Tensor) -> torch.Tensor:
    """Exponentially distributed noise (mean 1), float32 in (0, 17), one row per key.

    ``hashed_ids`` comes from ``hash_token_ids``: (vocab_size,) for all tokens or (num_rows, num_candidates).
    With weights w, ``argmax(w / noise)`` draws from the distribution proportional to w: the Gumbel-max trick
    (-log noise is a Gumbel variate) without its second logarithm. A small change of w hardly ever changes the winner.
    """
    words = to_device(keys, hashed_ids.device, torch.int32).view(-1, 2, 1)  # (num_rows, 2, 1)
    hashed = _permute(hashed_ids ^ words[:, 0], words[:, 1])  # (num_rows, width)
    # 31 bits rather than a signed word, so that values next to 0, where the likely winners are, keep full precision.
    uniform = hashed.bitwise_and_(0x7FFFFFFF).to(torch.float32).mul_(-UNIT).sub_(UNIT / 2)  # in (-1, 0)
    return uniform.log1p_().neg_()


def _permute(words: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
    """lowbias32 in place, with ``key`` joined in after the first multiplication."""
    scratch = torch.empty_like(words)
    _xor_shift(words, 16, scratch).mul_(LOWBIAS_1)
    if key is not None:
        words.bitwise_xor_(key)
    _xor_shift(words, 15, scratch).mul_(LOWBIAS_2)
    return _xor_shift(words, 16, scratch)


def _xor_shift(words: torch.Tensor, shift: int, scratch: torch.Tensor) -> torch.Tensor:
    """``words ^= words >>> shift``; the mask removes the copies of the sign that an int32 shift brings in."""
    torch.bitwise_right_shift(words, shift, out=scratch)
    return words.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _mix64(word: int) -> int:
    word &= _MASK_64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
