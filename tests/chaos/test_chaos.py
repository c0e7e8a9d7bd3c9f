"""The short form of the chaos run; ``make chaos`` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import Options, run
from tests.chaos.tiny import save_tiny

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(600)]


def test_no_stream_is_lost_or_changed_whatever_dies_hangs_or_is_scaled(tmp_path: Path) -> None:
    figures = run(Options(seed=1, duration_s=60, model=str(save_tiny(tmp_path)), pace_s=3))
    print("\n".join(figures.lines()))
    assert figures.problems == []
    assert (figures.num_lost, figures.num_changed) == (0, 0)
    assert sum(figures.faults.values()) >= 8
    assert figures.num_streams >= 10
