"""A new host imports the runtime in one go, and collects its garbage afterwards as any process does."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import gc, sys
from shardray.runtime.cluster.first_import import load_runtime
assert "torch" not in sys.modules, "a host is light until it is given a place"
load_runtime("/nowhere", "float32", "cpu", 1)
num_kept = gc.get_freeze_count()
junk = []
junk.append(junk)
load_runtime("/nowhere", "float32", "cpu", 1)
print("shardray.runtime.engine.shard" in sys.modules, gc.isenabled(), num_kept > 0, gc.get_freeze_count() == num_kept)
"""


def test_the_runtime_is_imported_once_and_garbage_is_collected_again_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.split(), done.stderr) == (["True"] * 4, "")
