"""The noise is a pure function of its three inputs, and good enough to sample from."""

from __future__ import annotations

import math

import pytest
import torch

from shardray.runtime.engine.noise import exponential_noise, hash_token_ids, noise_key

VOCAB_SIZE = 49_152


def uniforms(seeds: list[int], positions: list[int], vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """The noise mapped back to (0, 1): (num_rows, vocab_size) float64."""
    keys = [noise_key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    return torch.exp(-exponential_noise(keys, hash_token_ids(torch.arange(vocab_size))).double())


def chi_square_deviation(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chi-square statistic in standard deviations from its mean."""
    freedom = counts.numel() - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard deviations from 0, for independent samples."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) * math.sqrt(a.numel())


def lowbias32(word: int, key: int = 0) -> int:
    word = (word ^ (word >> 16)) * 0x7FEB352D & 0xFFFFFFFF ^ key
    word = (word ^ (word >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return word ^ (word >> 16)


def splitmix64(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def reference_noise(seed: int, position: int, token_id: int) -> float:
    """The whole definition over Python integers."""
    golden = 0x9E3779B97F4A7C15
    key = splitmix64((splitmix64((seed + golden) % 2**64) + (position + 1) * golden) % 2**64)
    word = lowbias32(lowbias32(token_id) ^ (key >> 32), key & 0xFFFFFFFF)
    return -math.log1p(-((word & 0x7FFFFFFF) + 0.5) / 2**31)


def test_the_noise_is_the_documented_function_of_its_inputs():
    token_ids = [0, 1, 2, 49_151, 151_000]
    pairs = [(0, 0), (0, 1), (1, 0), (2**63, 5), (2**64 - 1, 131_071), (0x123456789ABCDEF, 77)]
    noise = exponential_noise([noise_key(*pair) for pair in pairs], hash_token_ids(torch.tensor(token_ids)))
    expected = torch.tensor([[reference_noise(*pair, token_id) for token_id in token_ids] for pair in pairs])
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=0)


def test_candidates_get_the_noise_they_have_in_the_whole_vocabulary():
    keys = [noise_key(5, 17), noise_key(5, 18)]
    hashed = hash_token_ids(torch.arange(VOCAB_SIZE))
    ids = torch.randint(VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(exponential_noise(keys, hashed[ids]), exponential_noise(keys, hashed).gather(1, ids))


def test_the_noise_is_positive_and_finite_even_for_extreme_words():
    words = torch.tensor([[0, -1, 2**31 - 1, -(2**31), 1]], dtype=torch.int32)
    noise = torch.cat([exponential_noise([noise_key(s, 3)], hash_token_ids(torch.arange(200_000))) for s in range(20)])
    for values in (noise, exponential_noise([(0, 0)], words)):
        assert bool((values > 0).all())
        assert bool(values.isfinite().all())


@pytest.mark.parametrize(
    ("seeds", "positions"), [([3] * 64, range(64)), (range(64), [9] * 64), ([2**63] * 64, range(64))]
)
def test_the_noise_is_uniform_over_bins_and_over_tokens(seeds, positions):
    values = uniforms(list(seeds), list(positions))
    counts = torch.histc(values, bins=4096, min=0.0, max=1.0)
    assert abs(chi_square_deviation(counts, torch.full_like(counts, values.numel() / 4096))) < 5
    # Each token id over the rows: the sum of 64 uniforms has mean 32 and variance 64 / 12.
    deviations = (values.sum(dim=0) - 32) / math.sqrt(64 / 12)
    assert deviations.abs().max() < 6
    assert abs(float(deviations.var()) - 1) < 0.05


def test_the_small_values_that_decide_a_draw_are_spread_as_they_should_be():
    values = 1 - uniforms([1] * 256, list(range(256)))
    for scale in (1e-3, 1e-4, 1e-5):
        expected = values.numel() * scale
        assert abs(int((values < scale).sum()) - expected) < 5 * math.sqrt(expected)


def test_neighbours_in_seed_position_and_token_id_are_independent():
    rows = uniforms([7, 7, 8, 7 + 0x9E3779B97F4A7C15 % 2**64, 2**32 + 7], [100, 101, 100, 99, 100])
    for i in range(len(rows)):
        assert abs(correlation(rows[i, :-1], rows[i, 1:])) < 5
        for j in range(i):
            assert abs(correlation(rows[i], rows[j])) < 5
            for shift in (1, 2, 256):
                assert abs(correlation(rows[i, shift:], rows[j, :-shift])) < 5


def test_pairs_of_positions_fill_the_square_evenly():
    values = uniforms([11] * 64, list(range(64)))
    cells = ((values[:-1] * 32).long() * 32 + (values[1:] * 32).long()).flatten()
    counts = torch.bincount(cells, minlength=1024).double()
    assert abs(chi_square_deviation(counts, torch.full_like(counts, cells.numel() / 1024))) < 5


def test_no_two_of_many_keys_are_equal():
    assert len({noise_key(seed, position) for seed in range(300) for position in range(300)}) == 90_000


@pytest.mark.gpu
def test_cuda_gives_the_same_words_as_the_cpu():
    keys = [noise_key(5, position) for position in range(8)]
    hashed = hash_token_ids(torch.arange(VOCAB_SIZE))
    on_cuda = hash_token_ids(torch.arange(VOCAB_SIZE, device="cuda"))
    assert torch.equal(on_cuda.cpu(), hashed)
    torch.testing.assert_close(
        exponential_noise(keys, on_cuda).cpu(), exponential_noise(keys, hashed), rtol=1e-6, atol=0
    )
