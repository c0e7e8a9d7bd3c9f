"""What the benchmarks make of records: verdicts on tokens, targets, the performance page, the tables on paper."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import side_by_side
from benchmarks.compare import omissions, quiet, read_records, target_table, to_markdown
from benchmarks.harness import Outputs
from benchmarks.kinds import parse_label
from benchmarks.metrics import digest, goodput_figures, watched_figures
from benchmarks.paper import SCALING_PAGE, with_tables
from benchmarks.protocol import Request, Run, Trace
from benchmarks.referee import BOUNDS, measure, verdict
from benchmarks.report import PERFORMANCE_DIR, PERFORMANCE_PAGE, write_report
from benchmarks.suites import SUITES, Heat, Suite
from benchmarks.workloads import WORKLOADS, make_workload
from tests.tiny_models import save_llama

MACHINE = {"cpu": "processor", "num_cores": 2, "read_bytes_per_s": 2e10, "bf16_flop_per_s": 1e12, "floor_tok_s": 80.0}
FIGURES = ("ttft_s", "itl_p50_s", "itl_p99_s", "startup_s", "peak_rss_bytes", "cpu_s_per_token", "decode_tok_s")


def record(
    label: str, workload: str, output_tok_s: float = 100.0, round_number: int = 0, **fields: Any
) -> dict[str, Any]:
    return dict.fromkeys(FIGURES, 40.0) | {
        "kind": "run", "run_id": "first", "contestant": label, "is_peer": not label.startswith(("shardray", "served")),
        "busy": False, "workload": workload, "round": 0, "output_tok_s": 100.0, "startup_busy": False,
        "engine": {"control_s_per_step": 0.0002, "kv_waste": 0.03}, "num_threads": 2, "model": "m", "dtype": "bfloat16",
        "agreement": {"identical_share": 1.0}, "output_sha256": "5ea1", "machine": MACHINE,
        "time": "2026-11-23T04:00:00+0000",
    } | fields  # fmt: skip


def all_kinds() -> list[dict[str, Any]]:
    """A little of everything that the page shows."""
    watched = {f"watched_itl_{name}_s": 0.1 for name in ("before_p50", "p50", "p99", "max")} | {"others_ttft_s": 2.0}
    now = {"time": "2026-11-23T04:00:00+0000", "busy": False}
    shape = {"shape": "2x1x1", "idle_cores": 0.004, "num_hosts": 2, "busy": False}
    shape |= {"weight_bytes": 1 << 28, "kv_bytes": 1 << 27, "pss_bytes": 1 << 30, "over_bytes": 3 << 27}
    verdict_of = now | {
        "kind": "agreement",
        "contestant": "vllm",
        "workload": "single",
        "num_requests": 1,
        "num_same": 0,
    }
    verdict_of |= {"num_tokens": 128, "num_other": 2, "worst_gap": 0.1, "bound": 0.5, "agrees": True}
    return [
        *(record(label, name) for label in ("shardray", "vllm") for name in ("single", "concurrent", "mixed")),
        record("shardray", "long-prompts", **watched),
        record("shardray", "poisson-2", good_share=0.5, goodput_req_s=1.0),
        *(record("shardray:tp=2,threads=1", name) for name in ("batch-4", "batch-16", "context-512")),
        verdict_of | {"output_sha256": "5ea1"},
        verdict_of | {"output_sha256": "07e4", "num_same": 77},
        verdict_of | {"num_same": 88},  # as early records have it
        now | {"kind": "driver", "num_streams": 8, "num_replicas": 1, "tokens_per_s": 2000.0, "driver_cores": 0.2,
               "driver_cpu_s_per_token": 1e-4},
        now | {"kind": "startup", "contestant": "shardray", "round": 0, "size": "60M", "weight_bytes": 1 << 27,
               "startup_s": 3.0},
        now | {"kind": "serve", "contestant": "local", "round": 0, "first_token_s": 9.0},
        now | {"kind": "fleet", "idle_cores": 0.004, "most_over_bytes": 3 << 27, "shapes": [shape]},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("docs"))


def write_page(folder: Path) -> Path:
    (folder / "performance").mkdir()
    (folder / "performance" / "unmet.md").write_text("Ray takes most of the start.")
    write_report(all_kinds(), folder / "performance.md")
    return folder / "performance.md"


def test_the_page_shows_every_target_and_each_plot_that_it_names(page: Path) -> None:
    text = page.read_text()
    assert "| serve to first token, Ray started too | – | ≤ 8 s | 9.00 s | 1 | – | **no** |" in text
    assert "| 32 streams, over the best peer | concurrent | ≥ 1.4× | 1.00× | 1 | vllm | **no** |" in text
    assert "| idle fleet, of a core | – | ≤ 1 % | 0.40 % | 1 | – | yes |" in text
    assert "Ray takes most of the start." in text
    images = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(images) == 6
    assert all((page.parent / image).stat().st_size > 1000 for image in images)


def test_the_performance_page_is_what_its_records_give(tmp_path: Path) -> None:
    shutil.copytree(PERFORMANCE_DIR, tmp_path / PERFORMANCE_DIR.name, ignore=shutil.ignore_patterns("*.png"))
    page = tmp_path / PERFORMANCE_PAGE.name
    write_report(read_records(sorted(PERFORMANCE_DIR.glob("*.jsonl"))), page)
    assert PERFORMANCE_PAGE.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        "python -m benchmarks report"
    )


def test_only_verdicts_on_the_tokens_of_a_run_that_is_shown_are_shown(page: Path) -> None:
    _, _, section = page.read_text().partition("## The same tokens")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| vllm")]
    assert rows == ["| vllm | single | 1 | 0 | 2 of 128 | 0.100 (≤ 0.5) | yes |"]


def test_a_verdict_names_the_tokens_that_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "judge", lambda *_: verdict([[0.0]], 0.5))
    single, found, outputs = make_workload("single", 49152), [], Outputs()
    traces = {label: [Trace(0.0, [token_id], [1.0])] for label, token_id in (("shardray", 5), ("vllm", 6))}
    for label, own in traces.items():
        outputs.add(label, single, own)
    setup = side_by_side.RunSetup("m", "bfloat16", 1, None, 0, 1.0, 0.0, 1.0, True, "first")
    assert side_by_side.judge_outputs(outputs, setup, Path(), found.append)
    assert [one["output_sha256"] for one in found] == [digest(own) for own in traces.values()]


def test_the_same_records_give_the_same_page(page: Path, tmp_path: Path) -> None:
    write_page(tmp_path)
    first, second = (sorted(folder.rglob("*.*")) for folder in (page.parent, tmp_path))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_figure_measured_beside_other_work_is_named_and_not_shown() -> None:
    records = [record("shardray", "single", busy=True), record("vllm", "single")]
    assert len(quiet(records)) == 1
    assert "1 of 2 runs left out" in omissions(records)[0]
    assert "more than 0.15 of a core" in omissions(records)[0]
    table = target_table(quiet(records))
    assert "| one stream, over the best peer | single | ≥ 1.15× | not measured | – | vllm | – |" in table


def test_a_failed_run_is_said_and_counts_for_nothing() -> None:
    failed = {"kind": "run", "contestant": "vllm", "round": 0, "error": "vllm ended early: no compiler"}
    assert "Failed: vllm ended early: no compiler" in to_markdown([record("shardray", "single"), failed])


def test_a_token_that_the_reference_likes_much_less_is_a_disagreement() -> None:
    near, far = verdict([[0.0, 0.2], [0.0, 0.0]], bound=0.5), verdict([[0.0, 0.7]], bound=0.5)
    assert (near.agrees, near.num_same, near.num_other, near.num_tokens) == (True, 1, 1, 4)
    assert not far.agrees


def test_the_referee_knows_the_models_own_tokens_from_others(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=2)
    request = Request([5, 17, 42, 99], 6)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([request.prompt_ids])
    token_ids = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 4:].tolist()
    others = [(token_ids[0] + 1) % 251, *token_ids[1:]]
    sequences = [[request.prompt_ids, taken] for taken in (token_ids, others)]
    own, other = measure({"model_dir": folder, "num_threads": torch.get_num_threads(), "sequences": sequences})
    assert own == [0.0] * 6
    assert not verdict([other], BOUNDS["float32"]).agrees


def test_gaps_between_tokens_are_taken_while_the_long_prompts_run() -> None:
    watched = Trace(0.0, [1] * 6, [1.0, 1.1, 1.2, 1.7, 2.3, 2.4])
    long_one = Trace(1.15, [1, 1], [2.0, 2.35])
    figures = watched_figures([watched, long_one], num_watched=1)
    assert figures["watched_itl_before_p50_s"] == pytest.approx(0.1)
    assert figures["watched_itl_p50_s"] == pytest.approx(0.1)  # of 0.1, 0.5, 0.6, 0.1
    assert figures["watched_itl_max_s"] == pytest.approx(0.6)
    assert figures["others_ttft_s"] == pytest.approx(0.85)


def test_requests_count_as_good_by_their_first_token_and_their_pace() -> None:
    in_time, late = Trace(0.0, [1, 2], [0.3, 0.35]), Trace(1.0, [1, 2], [1.6, 1.65])
    slow = Trace(2.0, [1, 2], [2.1, 2.4])
    figures = goodput_figures([in_time, late, slow])
    assert figures["good_share"] == pytest.approx(1 / 3)
    assert figures["goodput_req_s"] == pytest.approx(0.5)


def test_arrivals_are_random_and_the_same_for_all() -> None:
    two = make_workload("poisson-2", 49152)
    assert two == make_workload("poisson-2", 49152)
    arrivals = [request.arrival_s for request in two.requests]
    assert arrivals == sorted(arrivals)
    assert 20 <= len(arrivals) <= 40
    long_prompts = make_workload("long-prompts", 49152)
    assert [request.arrival_s > 0 for request in long_prompts.requests] == [False] * 16 + [True] * 8
    assert make_workload("context-8128", 49152).max_model_len <= 8192


def test_every_suite_names_what_is_there() -> None:
    for suite in SUITES.values():
        for labels, workloads in suite.tasks:
            assert all(parse_label(label) for label in labels)
            assert set(workloads) <= set(WORKLOADS)


def test_rounds_are_counted_on_from_heat_to_heat() -> None:
    suite = Suite("two heats", (Heat(((("a",), ("single",)),), 2), Heat(((("b",), ("mixed",)),), 3)))
    assert [rounds for _, rounds in suite.numbered()] == [range(2), range(2, 5)]
    assert [rounds for _, rounds in suite.numbered(1)] == [range(1), range(1, 2)]
    assert [heat.tasks for heat, _ in suite.numbered()] == [(task,) for task in suite.tasks]


def test_the_scaling_page_has_the_tables_of_todays_formulas() -> None:
    text = SCALING_PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "python -m benchmarks paper --write"


def test_the_warm_up_has_other_tokens_in_the_same_shapes() -> None:
    from benchmarks.contestants.base import warm_up

    late = Run([Request([1, 2, 3], 8, arrival_s=float(at)) for at in range(40)], 1)
    assert warm_up(late) == [Request([3, 2, 1], 4)] * 16
    assert warm_up(Run([Request([1, 2], 2)], 1)) == [Request([2, 1], 2)]
