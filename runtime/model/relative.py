"""Relative position biases in buckets (T5, arXiv 1910.10683)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardray.runtime.model.positions import Relative


def bias_by_distance(relative: Relative, causal: bool, weight: Tensor) -> Tensor:
    """(n, 2 m + 1) float32: the bias of each head for distances -m to m; further ones are as those at the ends.

    ``weight``: (buckets, n). A distance is the position of the query less that of the key.
    """
    furthest = relative.max_distance
    distances = torch.arange(-furthest, furthest + 1)
    return weight.float()[_buckets(relative, causal, distances)].T.contiguous()


def _buckets(relative: Relative, causal: bool, distances: Tensor) -> Tensor:
    """Half of the buckets hold one distance each; the others widen logarithmically.

    Looking both ways, each way gets half of them, what lies behind first.
    """
    count = relative.num_buckets if causal else relative.num_buckets // 2
    first = torch.zeros_like(distances) if causal else (distances < 0).long() * count
    distances = distances.clamp(min=0) if causal else distances.abs()
    exact = count // 2
    steps = torch.log(distances.clamp(min=1).float() / exact) / math.log(relative.max_distance / exact)
    wide = (exact + (steps * (count - exact)).long()).clamp(max=count - 1)
    return first + torch.where(distances < exact, distances, wide)
