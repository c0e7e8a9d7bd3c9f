"""Numbers as their clients meant them."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_written(value: np.floating[Any]) -> float:
    """What 0.7 was before it lost half of its bits: a seed then gives the same tokens as through our own service."""
    return float(str(value))
