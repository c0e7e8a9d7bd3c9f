"""The longest files come first, so that no worker begins one of them when the others have run out of work.

No example of hypothesis has a deadline: how long one takes says how busy the machine is.
"""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

_TESTS = Path(__file__).parent
_LONGEST = [_TESTS / name for name in ("model/test_triton_kernels.py", "test_gpu_benchmark.py")]  # minutes

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path not in _LONGEST)
