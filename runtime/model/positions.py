"""How a model knows where a token stands: the kinds of positions that a spec can name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by ``factor``, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnScaling:
    """NTK-by-parts interpolation with attention scaling (YaRN, arXiv 2309.00071)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware: the base grows with the context that is served, once that is longer than the trained window."""

    factor: float
    original_max_position: int


@dataclass(frozen=True)
class LongRopeScaling:
    """A factor for each frequency, of two sets: for contexts within the first window, and beyond (arXiv 2402.13753)."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position: int
    attention_factor: float


Scaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (arXiv 2104.09864): pairs of the first ``dim`` elements of each head are rotated.

    A pair is element i and i + dim / 2 or, ``interleaved``, 2 i and 2 i + 1.
    """

    theta: float
    dim: int
    scaling: Scaling | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class Learned:
    """A learned embedding per position, added to the token's."""

    num_positions: int
    offset: int = 0


@dataclass(frozen=True)
class Sinusoidal:
    """Sines and cosines of each position, of wavelengths from 2 pi to 10,000 * 2 pi, added (arXiv 1706.03762).

    They take turns or, ``in_halves``, all sines come first. ``reaches_end``: the last wavelength is the longest named
    above, instead of the one before it.
    """

    num_positions: int
    offset: int = 0
    in_halves: bool = False
    reaches_end: bool = False


Positions = Learned | Sinusoidal


@dataclass(frozen=True)
class Relative:
    """A learned bias of each head for each bucket of distances; from ``max_distance`` on all share one.

    The buckets widen with distance (arXiv 1910.10683).
    """

    num_buckets: int
    max_distance: int
