"""The benchmark harness on a tiny random model: what it writes, and how it counts."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import processes
from benchmarks.compare import figures_table, to_markdown
from benchmarks.contestants.base import run as run_contestant
from benchmarks.contestants.slots import Sequence, Slots
from benchmarks.gguf_writing import gguf_of
from benchmarks.kinds import KINDS, parse_label
from benchmarks.machine import BUSY_CORES, OthersMeter, words_to_read
from benchmarks.metrics import agreement, pass_figures, percentile
from benchmarks.protocol import Request, Run, Trace
from benchmarks.targets import Ratio
from benchmarks.workloads import MAIN, SAMPLED, make_workload
from shardray.parallel import huge_pages
from shardray.runtime.model.gguf_file import GgufFile
from tests.tiny_models import LLAMA, save_llama

REPOSITORY = Path(__file__).parents[1]
RATES = (
    "decode_tok_s",
    "output_tok_s",
    "total_tok_s",
    "ttft_s",
    "itl_p99_s",
    "startup_s",
    "peak_rss_bytes",
    "pss_bytes",
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


def run_bench(
    model_folder: Path,
    output: Path,
    *labels: str,
    rounds: int = 1,
    workloads: tuple[str, ...] = MAIN,
    judge: bool = False,
) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and the records that it printed; the file has to hold the same ones."""
    command = [sys.executable, "-m", "benchmarks", "run", "--model", str(model_folder), "--dtype", "float32"]
    size = ["--scale", "0.1", "--threads", "1", "--rounds", str(rounds), "--quiet-timeout-s", "0"]
    chosen = [argument for label in labels for argument in ("--contestant", label)]
    chosen += [argument for name in workloads for argument in ("--workload", name)]
    chosen += ["--judge" if judge else "--no-judge"]
    done = subprocess.run(
        [*command, *size, *chosen, "--output", str(output)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stdout == output.read_text(), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def check_records(records: list[dict[str, Any]], labels: list[str], num_rounds: int = 1) -> None:
    assert [(record["workload"], record["round"], record["contestant"]) for record in records] == [
        (workload, number, label) for workload in MAIN for number in range(num_rounds) for label in labels
    ]
    for record in records:
        assert all(record[name] > 0 for name in RATES), record
        if record["num_requests"] == 1:  # its first token aside, a stream takes no longer than with it
            share = 1 - 1 / record["num_output_tokens"]
            assert record["decode_tok_s"] >= 0.999 * share * record["output_tok_s"]
        assert record["agreement"]["identical_share"] == 1.0
        assert isinstance(record["busy"], bool)
        assert record["machine"]["read_bytes_per_s"] > 0


@pytest.mark.integration
def test_every_run_is_one_json_line_and_contestants_take_turns(model_folder: Path, tmp_path: Path) -> None:
    code, records = run_bench(model_folder, tmp_path / "out.jsonl", "shardray", "transformers", rounds=2)
    check_records(records, ["shardray", "transformers"], num_rounds=2)
    assert code == 0
    assert to_markdown(records, allow_busy=True).count("| shardray | 1 | 2 |") == len(MAIN)


@pytest.mark.integration
def test_a_served_mesh_of_two_ranks_gives_the_same_tokens_as_the_engine_in_process(
    model_folder: Path, tmp_path: Path
) -> None:
    labels = ["shardray", "served:tp=2,threads=1"]
    code, records = run_bench(model_folder, tmp_path / "out.jsonl", *labels)
    check_records(records, labels)
    assert records[-1]["runtime"]["num_shards"] == 2
    assert code == 0


@pytest.mark.integration
def test_sampled_tokens_are_drawn_and_not_compared(model_folder: Path, tmp_path: Path) -> None:
    labels = ["shardray", "served", "transformers"]
    code, records = run_bench(model_folder, tmp_path / "out.jsonl", *labels, workloads=(SAMPLED,))
    assert [record["contestant"] for record in records] == labels
    assert len({record["output_sha256"] for record in records}) == len(labels)
    assert "0 %" not in figures_table(records, SAMPLED).splitlines()[-1]
    assert code == 0


@pytest.mark.skipif(KINDS["llama.cpp"].python() is None, reason="needs make bench-peers")
def test_llama_cpp_gives_the_same_tokens_from_the_file_written_for_it(model_folder: Path, tmp_path: Path) -> None:
    _, records = run_bench(model_folder, tmp_path / "out.jsonl", "shardray", "llama.cpp")
    agreed = [record["agreement"] for record in records if record["contestant"] == "llama.cpp"]
    assert len(agreed) == len(MAIN)
    assert all(item["mean_common_prefix"] > 6 for item in agreed)  # its keys and values are float16


def test_a_batch_for_llama_cpp_has_its_ids_in_order_without_gaps_and_what_decodes_comes_first() -> None:
    slots = Slots(4)
    for index in range(6):
        slots.add(Sequence.of(index, Request([7] * 10, 3)))
    slots.admit()
    assert [(seq_id, num_tokens) for seq_id, _, num_tokens in slots.plan(25)] == [(0, 10), (1, 10), (2, 5)]
    for seq_id in range(4):
        slots.running[seq_id].pending = deque([7])
    for seq_id in (2, 1):
        slots.running[seq_id].num_left = 0
        slots.release_ended()
    slots.admit()
    assert [slots.running[seq_id].index for seq_id in range(4)] == [0, 4, 5, 3]
    assert [(seq_id, num_tokens) for seq_id, _, num_tokens in slots.plan(25)] == [(0, 1), (3, 1), (1, 10), (2, 10)]
    slots.running[1].pending = slots.running[2].pending = deque([7])
    assert [seq_id for seq_id, *_ in slots.plan(25)] == [0, 1, 2, 3]


@pytest.mark.integration
def test_a_contestant_that_fails_is_a_record_with_the_reason(model_folder: Path, tmp_path: Path) -> None:
    code, records = run_bench(model_folder, tmp_path / "out.jsonl", "transformers:cache=none")
    assert code == 1
    assert "transformers:cache=none is unknown; give dynamic or static" in records[0]["error"]


@pytest.mark.parametrize("label", ["sglang", "served:dp=2", "served:tp"])
def test_a_label_that_names_nothing_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match=label):
        parse_label(label)


def test_the_same_seed_gives_the_same_requests_within_the_stated_lengths() -> None:
    mixed = make_workload("mixed", vocab_size=49152)
    assert mixed == make_workload("mixed", vocab_size=49152)
    assert mixed != make_workload("mixed", vocab_size=49152, seed=1)
    assert len(mixed.requests) == 64
    assert all(16 <= len(request.prompt_ids) <= 512 and 16 <= request.max_tokens <= 256 for request in mixed.requests)
    concurrent = make_workload("concurrent", vocab_size=49152)
    assert {(len(request.prompt_ids), request.max_tokens) for request in concurrent.requests} == {(128, 128)}
    assert len(concurrent.requests) == 32


def test_rates_of_a_stream_leave_the_first_token_out_and_those_of_a_batch_do_not() -> None:
    first = Trace(10.0, [1, 2, 3], [10.5, 10.6, 10.7])
    second = Trace(10.0, [4, 5, 6], [10.8, 10.9, 11.0])
    figures = pass_figures([first, second], num_prompt_tokens=4)
    assert figures.decode_tok_s == pytest.approx(10.0)
    assert figures.output_tok_s == pytest.approx(6.0)
    assert figures.total_tok_s == pytest.approx(10.0)
    assert figures.ttft_s == pytest.approx(0.65)
    assert figures.itl_p50_s == pytest.approx(0.1)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(range(1, 101)), 99) == 99
    assert percentile([], 99) == 0.0


def test_agreement_counts_whole_answers_and_common_beginnings() -> None:
    own, other = [Trace(0, [1, 2, 3]), Trace(0, [1, 2, 3])], [Trace(0, [1, 2, 3]), Trace(0, [1, 9, 3])]
    assert agreement(own, other) == {"identical_share": 0.5, "mean_common_prefix": 2.0}


def test_a_ratio_compares_within_a_round_and_with_the_best_peer() -> None:
    target = Ratio("", "concurrent", "output_tok_s", "shardray", (), 1.4)
    rates = {"shardray": 600.0, "transformers": 300.0, "llama.cpp": 150.0, "served": 590.0}
    records = [_record(label, rate, round_number=0) for label, rate in rates.items()]
    alone = _record("shardray", 900.0, round_number=1)
    assert target.read([*records, alone]).values == [2.0]
    variant = _record("llama.cpp:dtype=float16", 400.0)
    reading = target.read([*records, variant])
    assert (reading.values, reading.rival) == ([1.5], "llama.cpp:dtype=float16")


def test_a_round_without_the_strongest_rival_gives_no_ratio() -> None:
    target = Ratio("", "concurrent", "output_tok_s", "shardray", (), 1.4)
    rounds = [{"shardray": 600.0, "vllm": 500.0, "llama.cpp": 100.0}, {"shardray": 600.0, "llama.cpp": 100.0}]
    records = [_record(label, rate, number) for number, rates in enumerate(rounds) for label, rate in rates.items()]
    assert target.read(records).values == [1.2]


def test_a_ratio_never_compares_two_invocations() -> None:
    target = Ratio("", "concurrent", "output_tok_s", "shardray", (), 1.4)
    here = [_record("shardray", 600.0), _record("vllm", 500.0)]
    later = [_record("shardray", 900.0, run_id="later"), _record("vllm", 600.0, round_number=1, run_id="later")]
    assert target.read([*here, *later]).values == [1.2]


def test_time_to_first_token_is_better_when_lower() -> None:
    target = Ratio("", "concurrent", "output_tok_s", "shardray", ("served", "transformers"), 1.0, lower_is_better=True)
    records = [_record("shardray", 0.05), _record("served", 0.2), _record("transformers", 0.1), _record("vllm", 0.01)]
    assert target.read(records).values == [2.0]


def test_no_ratio_comes_from_a_busy_machine() -> None:
    records = [_record(label, 100.0, busy=True) for label in ("shardray", "transformers", "llama.cpp")]
    shown = to_markdown(records)
    assert "3 of 3 runs left out" in shown
    assert "1.00" not in shown
    assert "1.00" in to_markdown(records, allow_busy=True)


def _record(
    label: str, rate: float, round_number: int = 0, busy: bool = False, run_id: str = "first"
) -> dict[str, Any]:
    figures = ("ttft_s", "itl_p50_s", "itl_p99_s", "startup_s", "peak_rss_bytes", "cpu_s_per_token", "decode_tok_s")
    machine = {"cpu": "processor", "num_cores": 2, "read_bytes_per_s": 1e9, "bf16_flop_per_s": 1e9, "floor_tok_s": 1.0}
    return dict.fromkeys(figures, 7.0) | {
        "kind": "run", "run_id": run_id, "is_peer": label not in ("shardray", "served"), "contestant": label,
        "workload": "concurrent", "round": round_number, "output_tok_s": rate, "busy": busy,
        "startup_busy": False, "engine": {}, "num_threads": 2, "agreement": {"identical_share": 1.0},
        "time": "2026-11-23T04:00:00+0000", "model": "m", "dtype": "bfloat16", "machine": machine,
    }  # fmt: skip


def test_the_gguf_file_holds_the_weights_with_rotary_pairs_side_by_side(model_folder: Path, tmp_path: Path) -> None:
    written = GgufFile(gguf_of(model_folder, "bfloat16", tmp_path))
    weights = load_file(model_folder / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(written.read_tensor("blk.1.ffn_down.weight"), weights[down].bfloat16().float())
    key = weights["model.layers.0.self_attn.k_proj.weight"].bfloat16().float()
    stored = written.read_tensor("blk.0.attn_k.weight")
    half = LLAMA["head_dim"] // 2
    assert torch.equal(stored[:4], key[[0, half, 1, half + 1]])
    assert written.require("llama.vocab_size", int) == LLAMA["vocab_size"]


def _own_huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


@pytest.mark.skipif(not huge_pages.are_there(), reason="the system gives no huge pages")
def test_reads_are_timed_out_of_huge_pages() -> None:
    before = _own_huge_bytes()
    words = words_to_read()
    assert _own_huge_bytes() - before > words.nbytes // 2


def test_a_process_tree_counts_the_work_of_its_descendants() -> None:
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ntime.sleep(60)"
    child = subprocess.Popen(["sh", "-c", '"$0" -c "$1"; true', sys.executable, code])
    try:
        deadline = time.monotonic() + 30
        while processes.cpu_seconds(processes.process_tree(child.pid)) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        tree = processes.process_tree(child.pid)
        assert len(tree) == 2
        assert 0.3 <= processes.cpu_seconds(tree) < 2
        assert processes.peak_rss_bytes(tree) > processes.pss_bytes(tree) > 1 << 20
    finally:
        for pid in processes.process_tree(child.pid):
            os.kill(pid, 9)
        child.wait()


class _HungryOnce:
    """A contestant that takes a lot of memory when it warms up, and none afterwards."""

    details: ClassVar[dict[str, Any]] = {}
    most_bytes = 0

    def prepare(self, requests: list[Request]) -> None: ...

    def serve(self, requests: list[Request]) -> list[Trace]:
        if not self.most_bytes:
            _ = b"1" * (300 << 20)
            self.most_bytes = processes.peak_rss_bytes([os.getpid()])
        return [Trace(0.0, [1], [1.0])]

    def sample(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def test_a_workload_is_not_charged_with_what_was_needed_before_it() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:  # that has no children
        peak_bytes, most_bytes = other.submit(_run_hungry).result(timeout=60)
    assert peak_bytes < most_bytes - (200 << 20)


def _run_hungry() -> tuple[int, int]:
    """Its peak as it is recorded, and the one before that."""
    contestant = _HungryOnce()
    return run_contestant(contestant, Run([Request([1], 1)], 1)).peak_rss_bytes, contestant.most_bytes


def test_the_peaks_of_a_process_that_has_ended_are_nothing_to_forget() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    processes.forget_peaks([ended.pid])


def test_the_work_of_processes_that_are_not_ours_is_seen() -> None:
    busy = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    meter = OthersMeter()
    subprocess.run(["sh", "-c", '"$0" -c "$1" &', sys.executable, busy], check=True)  # left by its parent at once
    time.sleep(1.0)
    assert meter.cores() > BUSY_CORES
