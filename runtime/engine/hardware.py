"""How fast a host is at what a step is made of: as a data sheet has it, or as it was measured (``measuring.py``)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from shardray.runtime.model.costs import Work

USUAL_LINK_BYTES_PER_S, USUAL_MESSAGE_S = 50e9, 5e-6  # of one adapter with RDMA


@dataclass(frozen=True)
class Roofline:
    """Seconds for a byte that is read, against the arithmetic that it is read for.

    Below the first point reading is the limit, beyond the last one arithmetic; between two points lies a straight line.
    """

    points: tuple[tuple[float, float], ...]  # (FLOPs a byte, seconds a byte), rising

    @classmethod
    def of(cls, bytes_per_s: float, flops_per_s: float) -> Roofline:
        """Whichever is slower of the two."""
        return cls(((flops_per_s / bytes_per_s, 1 / bytes_per_s),))

    @classmethod
    def median(cls, rooflines: Sequence[Roofline]) -> Roofline:
        """Point by point, of some that were measured at the same ones."""
        by_point = zip(*(one.points for one in rooflines), strict=True)
        return cls(tuple((at[0][0], median(byte_s for _, byte_s in at)) for at in by_point))

    def at_most(self, other: Roofline, share: float) -> Roofline:
        """The slower of this one and a share of ``other``, which was measured at the same points."""
        pairs = zip(self.points, other.points, strict=True)
        return Roofline(tuple((intensity, max(byte_s, other_s / share)) for (intensity, byte_s), (_, other_s) in pairs))

    def time_s(self, work: Work) -> float:
        return work.num_bytes * self._byte_s(work.flops / work.num_bytes) if work.num_bytes else 0.0

    def _byte_s(self, intensity: float) -> float:
        if intensity <= self.points[0][0]:
            return self.points[0][1]
        for (low, low_s), (high, high_s) in itertools.pairwise(self.points):
            if intensity <= high:
                return low_s + (high_s - low_s) * (intensity - low) / (high - low)
        last, last_s = self.points[-1]
        return last_s * intensity / last


@dataclass(frozen=True)
class Speed:
    """Of one host's kernels."""

    products: Roofline
    memory_bytes_per_s: float  # at which activations are read, and keys and values for many tokens
    decode_attention: Roofline  # where a sequence has one new token
    prefill_flops_per_s: float  # of attention, where it has many

    @classmethod
    def of(cls, bytes_per_s: float, flops_per_s: float) -> Speed:
        roofline = Roofline.of(bytes_per_s, flops_per_s)
        return cls(roofline, bytes_per_s, roofline, flops_per_s)

    @classmethod
    def median(cls, speeds: Sequence[Speed]) -> Speed:
        """Figure by figure, of some that were measured at the same points."""
        return cls(
            Roofline.median([speed.products for speed in speeds]),
            median(speed.memory_bytes_per_s for speed in speeds),
            Roofline.median([speed.decode_attention for speed in speeds]),
            median(speed.prefill_flops_per_s for speed in speeds),
        )

    @staticmethod
    def spread(speeds: Sequence[Speed]) -> float:
        """The slowest over the fastest: at reading weights, or at products with them, where they are further apart."""
        few = [speed.products.points[0][1] for speed in speeds]
        many = [speed.products.points[-1][1] for speed in speeds]
        return max(max(few) / min(few), max(many) / min(many))

    def attention_time_s(self, work: Work, is_decode: bool) -> float:
        if is_decode:
            return self.decode_attention.time_s(work)
        return max(work.flops / self.prefill_flops_per_s, work.num_bytes / self.memory_bytes_per_s)

    def at_most(self, other: Speed, share: float) -> Speed:
        """The slower of this one and a share of ``other``, which was measured at the same points."""
        return Speed(
            self.products.at_most(other.products, share),
            min(self.memory_bytes_per_s, share * other.memory_bytes_per_s),
            self.decode_attention.at_most(other.decode_attention, share),
            min(self.prefill_flops_per_s, share * other.prefill_flops_per_s),
        )


@dataclass(frozen=True)
class Launches:
    """What a step takes beside arithmetic and bytes: planning, launching, and kernels' tasks with little to do."""

    step_s: float = 0.0
    layer_s: float = 0.0  # for each layer
    row_s: float = 0.0  # for each sequence in each layer

    def time_s(self, num_layers: int, num_seqs: int) -> float:
        return self.step_s + num_layers * (self.layer_s + num_seqs * self.row_s)


@dataclass(frozen=True)
class Machine:
    """What ``num_hosts`` hosts on one machine do each while all of them are busy: its memory and cores are shared."""

    num_hosts: float
    speed: Speed


@dataclass(frozen=True)
class Hardware:
    """Of one host that has its machine for itself, and of what joins it to the others."""

    speed: Speed
    link_bytes_per_s: float
    message_s: float  # before the first byte of a message arrives
    decode_launches: Launches = Launches()
    prefill_launches: Launches = Launches()
    machine: Machine | None = None  # that all hosts share; None: each has one of its own
    spread: float | None = None  # the slowest of the rounds it was measured in over the fastest; None: by a data sheet

    @classmethod
    def of(cls, memory_bytes_per_s: float, flops_per_s: float, link_bytes_per_s: float, message_s: float) -> Hardware:
        """By a data sheet."""
        return cls(Speed.of(memory_bytes_per_s, flops_per_s), link_bytes_per_s, message_s)

    def beside(self, num_busy: int) -> Hardware:
        """The same host while ``num_busy`` of its machine's are busy, itself included."""
        if self.machine is None or num_busy == 1:
            return self
        share = self.machine.num_hosts / num_busy
        return dataclasses.replace(self, speed=self.speed.at_most(self.machine.speed, share))

    def among(self, replicas: int) -> Hardware:
        """With a share of the machine, where it serves so many replicas."""
        if self.machine is None or replicas == 1:
            return self
        machine = dataclasses.replace(self.machine, num_hosts=self.machine.num_hosts / replicas)
        return dataclasses.replace(self, speed=self.beside(replicas).speed, machine=machine)
