"""How many replicas a load needs. Plain arithmetic over samples: no clock, no fleet; names as in Ray Serve."""

from __future__ import annotations

import dataclasses
import math

from shardray.runtime.config import AutoscalingSettings


@dataclasses.dataclass(frozen=True)
class LoadSample:
    """Requests accepted and not ended, queued ones included, at one moment."""

    time_s: float  # of any clock that never goes back
    num_ongoing: int


@dataclasses.dataclass(frozen=True)
class Leaning:
    """The wish for more replicas (+1) or fewer (−1), and since when it has lasted."""

    direction: int
    since_s: float


@dataclasses.dataclass(frozen=True)
class LoadHistory:
    """What decisions rest on."""

    samples: tuple[LoadSample, ...] = ()
    leaning: Leaning | None = None

    @property
    def mean_ongoing(self) -> float:
        return sum(sample.num_ongoing for sample in self.samples) / max(1, len(self.samples))


def decide(
    settings: AutoscalingSettings, history: LoadHistory, sample: LoadSample, num_replicas: int
) -> tuple[int, LoadHistory]:
    """The number of replicas to have from now on, and the history for the next decision.

    A change needs a load that has asked for it, without a break, for ``upscale_delay_s`` or ``downscale_delay_s``. The
    number is always within the bounds.
    """
    oldest_s = sample.time_s - settings.look_back_period_s
    recent = (*(kept for kept in history.samples if kept.time_s > oldest_s), sample)
    history = LoadHistory(recent, history.leaning)
    bounded = _bound(settings, num_replicas)
    desired = desired_replicas(settings, history.mean_ongoing, bounded)
    if desired == bounded:
        return bounded, LoadHistory(recent)
    leaning = _lean(history.leaning, +1 if desired > bounded else -1, sample.time_s)
    delay_s = settings.upscale_delay_s if leaning.direction > 0 else settings.downscale_delay_s
    if sample.time_s - leaning.since_s < delay_s:
        return bounded, LoadHistory(recent, leaning)
    return desired, LoadHistory(recent)


def desired_replicas(settings: AutoscalingSettings, mean_ongoing: float, num_replicas: int) -> int:
    """What a lasting load asks for.

    The factors scale the way there. The way down ends at what the load needs: one step further would have to be taken
    back. The way up may overshoot, which costs a way down and no more.
    """
    needed = mean_ongoing / settings.target_ongoing_requests
    if needed > num_replicas:
        boosted = math.ceil(num_replicas + settings.upscaling_factor * (needed - num_replicas))
        desired = max(boosted, num_replicas + 1)  # a difference may be too small to survive the rounding
    else:
        damped = math.ceil(num_replicas + settings.downscaling_factor * (needed - num_replicas))
        # A small factor rounds to no step at all; then one replica at a time.
        desired = max(math.ceil(needed), min(damped, num_replicas - 1))
    return _bound(settings, desired)


def _lean(leaning: Leaning | None, direction: int, now_s: float) -> Leaning:
    return leaning if leaning is not None and leaning.direction == direction else Leaning(direction, now_s)


def _bound(settings: AutoscalingSettings, num_replicas: int) -> int:
    most = num_replicas if settings.max_replicas is None else settings.max_replicas
    return max(settings.min_replicas, min(num_replicas, most))
