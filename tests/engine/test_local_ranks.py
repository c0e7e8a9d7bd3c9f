"""Several shards under one LLM: processes of this machine, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shardray import LLM, SamplingParams
from shardray.parallel.errors import MeshError
from shardray.parallel.plan import PlanError
from tests.tiny_models import Reference, save_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [(3, 4, 5), (7,) * 30, (9, 8)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(save_llama(tmp_path_factory.mktemp("tiny")))


def other_ranks() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "shardray.runtime.engine.local_ranks" in child.cmdline()]


@pytest.mark.parametrize(("tp_size", "pp_size"), [(3, 1), (2, 2)])
def test_shards_give_the_tokens_of_transformers_and_leave_no_process(
    reference: Reference, tp_size: int, pp_size: int
) -> None:
    shards = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size}
    with LLM(reference.folder, device="cpu", max_model_len=128, **shards) as llm:
        assert len(other_ranks()) == tp_size * pp_size - 1
        found = [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]
    assert found == [reference.greedy(prompt, 12) for prompt in PROMPTS]
    assert not other_ranks()


def test_what_cannot_be_formed_says_why_and_leaves_no_process(reference: Reference) -> None:
    with pytest.raises(PlanError, match="pipeline_parallel_size 50"):
        LLM(reference.folder, device="cpu", pipeline_parallel_size=50)
    assert not other_ranks()


def test_a_rank_that_cannot_form_is_named(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'shardray.runtime.engine.local_ranks' in sys.orig_argv:\n    os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(MeshError, match="rank 1 could not form: its process ended with code 7"):
        LLM(reference.folder, device="cpu", tensor_parallel_size=2)
    assert not other_ranks()


def test_a_rank_that_dies_ends_the_requests_with_its_name(reference: Reference) -> None:
    with LLM(reference.folder, device="cpu", tensor_parallel_size=2, max_model_len=128) as llm:
        [rank] = other_ranks()
        rank.send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match="rank 1"):
            llm.generate(PROMPTS, GREEDY)
    assert not other_ranks()


def test_what_libraries_print_does_not_reach_the_leader() -> None:
    script = (
        "import os\nfrom shardray.runtime.engine.local_ranks import _take_stdout\nanswers = _take_stdout()\n"
        "os.write(1, b'NCCL INFO Bootstrap')\nprint('formed', file=answers, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("formed\n", "NCCL INFO Bootstrap")
