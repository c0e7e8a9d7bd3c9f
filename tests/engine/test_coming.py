"""Results to come: steps are launched ahead, their tokens fetched in order, and a device that hangs or fails is named.

A device that takes its time stands in for a GPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from shardray import LLM, SamplingParams
from shardray.parallel.errors import DeviceLost, DeviceTimeout, MeshAborted
from shardray.runtime.engine import runner as runner_module
from shardray.runtime.engine.coming import HostCopy
from tests.engine.test_recorded import PARAMS
from tests.tiny_models import save_llama

STEP_S = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny"))


class SlowCopy(HostCopy):
    """What it holds is there after a while."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.is_there = False
        self._begin_s = time.monotonic()

    def ready(self) -> bool:
        return time.monotonic() > self._begin_s + STEP_S


def generate(folder: Path, **options: Any) -> list[list[int]]:
    params = [SamplingParams(**{"seed": 3, "max_tokens": 20, "ignore_eos": True} | fields) for fields in PARAMS]
    prompts = [tuple(range(3, 12 + 5 * i)) for i in range(len(params))]
    with LLM(folder, dtype="float32", device="cpu", max_num_seqs=4, **options) as llm:
        return [completion.token_ids for completion in llm.generate(prompts, params)]


def test_tokens_fetched_late_are_the_same_and_steps_run_ahead_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    launch, wait = runner_module.ShardRunner.launch, runner_module.ShardRunner._wait

    def noting_launch(self: Any, plan: Any) -> Any:
        events.append(("launched", plan.step))
        return launch(self, plan)

    def noting_wait(self: Any, step: int, *rest: Any) -> None:
        wait(self, step, *rest)
        events.append(("fetched", step))

    expected = generate(folder)
    monkeypatch.setattr(runner_module, "HostCopy", SlowCopy)
    monkeypatch.setattr(runner_module.ShardRunner, "launch", noting_launch)
    monkeypatch.setattr(runner_module.ShardRunner, "_wait", noting_wait)
    for record_steps in (False, True):
        events.clear()
        assert generate(folder, record_steps=record_steps) == expected
        fetched = [step for kind, step in events if kind == "fetched"]
        assert fetched == list(range(len(fetched)))
        ahead = sum(events.index(("launched", step + 1)) < events.index(("fetched", step)) for step in fetched[:-1])
        assert ahead > len(fetched) // 3


class HangingCopy(SlowCopy):
    def ready(self) -> bool:
        return False


class BrokenCopy(SlowCopy):
    def ready(self) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")


@pytest.mark.parametrize(
    ("copy", "error", "words"),
    [
        (HangingCopy, DeviceTimeout, r"step: stage 0 tensor rank 0 \(rank 0\): cpu did not finish within 0.2 s"),
        (BrokenCopy, DeviceLost, r"step: stage 0 tensor rank 0 \(rank 0\): cpu failed: CUDA error: an illegal memory"),
    ],
)
def test_a_device_that_hangs_or_fails_ends_the_engine_in_time_and_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, copy: type, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(runner_module, "HostCopy", copy)
    with LLM(folder, dtype="float32", device="cpu") as llm:
        object.__setattr__(llm._mesh._shard._mesh.spec, "timeout_s", 0.2)
        with pytest.raises(RuntimeError, match=words) as raised:
            llm.generate([5, 6], SamplingParams(max_tokens=4))
    assert isinstance(raised.value.__cause__, error)
    assert raised.value.__cause__.step == 0  # type: ignore[attr-defined]


def test_an_aborted_rank_does_not_wait_for_its_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "HostCopy", HangingCopy)
    with LLM(folder, dtype="float32", device="cpu") as llm:
        llm._mesh._shard._mesh.abort()
        with pytest.raises(RuntimeError, match="step: aborted") as raised:
            llm.generate([5, 6], SamplingParams(max_tokens=4))
    assert isinstance(raised.value.__cause__, MeshAborted)
