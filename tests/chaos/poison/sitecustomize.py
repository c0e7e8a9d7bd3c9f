"""Makes hosts break on two tokens, for the test of requests that break their step.

Python loads a module of this name by itself, in every process that has this folder on its PYTHONPATH; the runtime has
no such hook. A prompt with RAISING_ID raises in every rank's step, one with KILLING_ID ends the last rank's process.
"""

from __future__ import annotations

import importlib.machinery
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

RAISING_ID, KILLING_ID = 254, 255
_RUNNER = "shardray.runtime.engine.runner"


class _Poisoner:
    """Finds the one module, and changes it once it is loaded."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _RUNNER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_poisoned(module: Any) -> None:
            load(module)
            _poison(module.ShardRunner)

        loader.exec_module = load_poisoned
        return spec


def _poison(runner_class: Any) -> None:
    launch = runner_class.launch

    def launch_unless_poisoned(runner: Any, plan: Any) -> Any:
        token_ids = {token_id for row in plan.rows for token_id in row.token_ids}
        if RAISING_ID in token_ids:
            raise RuntimeError("a step was poisoned")
        place = runner._mesh.spec
        if KILLING_ID in token_ids and place.rank == place.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(runner, plan)

    runner_class.launch = launch_unless_poisoned


if __name__ == "sitecustomize":  # not where the test itself imports the tokens from here
    sys.meta_path.insert(0, _Poisoner)
