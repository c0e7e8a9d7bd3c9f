"""docs/performance.md from JSON lines: tables, plots, and what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import driver_load, fleet, plots, startup
from benchmarks.compare import Record, figures_table, machine_line, omissions, quiet, table, target_table, workloads_of
from benchmarks.metrics import GOOD_TPOT_S, GOOD_TTFT_S
from benchmarks.protocol import INT8
from benchmarks.workloads import MAIN, SAMPLED

PERFORMANCE_DIR = Path(__file__).parent.parent / "docs" / "performance"
PERFORMANCE_PAGE = PERFORMANCE_DIR.with_suffix(".md")
_NOTES = "unmet.md"  # by hand: what explains the targets that are not reached
_HEAD = """# Performance

Written by `python -m benchmarks report` from the JSON lines in `docs/performance/`; nothing here was typed in by hand
but the notes on targets that are not reached. How it is measured: [benchmarks/README.md](../benchmarks/README.md).
Figures are medians over the rounds, with their range. Ratios are taken within a round.
"""


def write_report(records: Sequence[Record], target: Path) -> None:
    """The Markdown file, and its plots in a folder of its name."""
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    every = quiet(records)
    used = [one for one in every if one.get("dtype") != INT8]
    runs = [record for record in used if record["kind"] == "run"]
    blocks = [_HEAD.strip(), _when(records)] + ([machine_line(runs)] if runs else [])
    blocks += ["## Targets", target_table(used), *omissions(records), *_notes(folder)]
    for section in (_side_by_side, _agreement, _arrivals, _growth, _driver, _startup, _fleet):
        blocks += section(used, folder)
    blocks += _in_int8([one for one in every if one.get("dtype") == INT8])
    target.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _when(records: Sequence[Record]) -> str:
    days = sorted({record["time"][:10] for record in records})
    return f"Measured on {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}, {len(records)} records."


def _notes(folder: Path) -> list[str]:
    notes = folder / _NOTES
    return [notes.read_text(encoding="utf-8").strip()] if notes.exists() else []


def _side_by_side(records: Sequence[Record], folder: Path) -> list[str]:
    runs = _runs(records, *MAIN, SAMPLED, "prompt-2048")
    if not runs:
        return []
    plots.draw_rates(folder / "rates.png", runs)
    tables = [f"### {name}\n\n{figures_table(runs, name)}" for name in workloads_of(runs)]
    return ["## Side by side", _image(folder, "rates.png", "output tokens a second"), *tables]


def _in_int8(records: Sequence[Record]) -> list[str]:
    """What stands apart: other weights, and no targets"""
    if not (runs := _of_kind(records, "run")):
        return []
    rule = (
        "The same workloads with weights of 8 bits: ours by `shardray quantize`, llama.cpp's as Q8_0, OpenVINO's by "
        "its own compression. None of the targets is about them."
    )
    tables = [f"### {name}, 8 bits\n\n{figures_table(runs, name)}" for name in workloads_of(runs)]
    return ["## Weights of 8 bits", rule, *tables]


def _agreement(records: Sequence[Record], folder: Path) -> list[str]:
    rows = [
        ["contestant", "workload", "requests", "with the reference's tokens", "other tokens", "worst gap", "agrees"]
    ]
    shown = {_tokens(run) for run in _of_kind(records, "run")}
    for one in (one for one in _of_kind(records, "agreement") if _tokens(one) in shown):
        cells = [one["contestant"], one["workload"], str(one["num_requests"]), str(one["num_same"])]
        other, gap = f"{one['num_other']} of {one['num_tokens']}", f"{one['worst_gap']:.3f} (≤ {one['bound']:g})"
        rows.append([*cells, other, gap, "yes" if one["agrees"] else "**no**"])
    if len(rows) == 1:
        return []
    rule = (
        "`transformers` in float32 reads each prompt and the contestant's own tokens. Where a contestant took another "
        "token than the reference's best, the reference's logits of the two differ by no more than the bound: rounding "
        "in the dtype explains it. Some requests of each workload, evenly chosen, with the tokens of a run shown above."
    )
    return ["## The same tokens", rule, table(rows)]


def _tokens(record: Record) -> tuple[str, str, str | None]:
    """Whose tokens, and which: of a run, or of a verdict on it. Early verdicts do not say which."""
    return record["contestant"], record["workload"], record.get("output_sha256")


def _arrivals(records: Sequence[Record], folder: Path) -> list[str]:
    blocks = []
    if long := _runs(records, "long-prompts"):
        blocks += ["### Prompts of 2,048 arrive while 16 decode", _long_table(long)]
    if shared := _runs(records, "shared-prefix"):
        blocks += ["### 32 prompts with the same first 512 tokens", figures_table(shared, "shared-prefix")]
    if poisson := _runs(records, "poisson-"):
        series = plots.median_series(poisson, "contestant", plots.number_of, "goodput_req_s", 1.0)
        plots.draw_lines(folder / "goodput.png", series, "requests/s offered", "in time, requests/s", diagonal=True)
        rule = (
            f"In time: the first token within {1e3 * GOOD_TTFT_S:g} ms, and the others {1e3 * GOOD_TPOT_S:g} ms apart "
            "or less on average. Requests of 128/64 arrive at random (Poisson), whatever has become of the others."
        )
        blocks += ["### Requests in time, at rising rates", rule, _image(folder, "goodput.png", "requests in time")]
        blocks += [_goodput_table(poisson)]
    return ["## Requests that come while others run", *blocks] if blocks else []


def _long_table(records: Sequence[Record]) -> str:
    names = ("watched_itl_before_p50_s", "watched_itl_p50_s", "watched_itl_p99_s", "watched_itl_max_s", "others_ttft_s")
    rows = [["contestant", "rounds", "between tokens before, p50 ms", "while they run, p50 ms", "p99 ms", "longest ms",
             "first token of a long prompt, ms"]]  # fmt: skip
    for label, own in _by(records, "contestant").items():
        rows.append([label, str(len(own)), *(f"{1e3 * _median(own, name):.0f}" for name in names)])
    return table(rows)


def _goodput_table(records: Sequence[Record]) -> str:
    names = workloads_of(sorted(records, key=plots.number_of))
    rows = [["contestant", *(f"{name.removeprefix('poisson-')} a second" for name in names)]]
    for label, own in _by(records, "contestant").items():
        by_workload = _by(own, "workload")
        cells = [
            f"{100 * _median(by_workload[name], 'good_share'):.0f} %" if name in by_workload else "–" for name in names
        ]
        rows.append([label, *cells])
    return table(rows)


def _growth(records: Sequence[Record], folder: Path) -> list[str]:
    blocks: list[str] = []
    for prefix, x_label, file in (
        ("batch-", "sequences that decode together (32 to 80 tokens each)", "step-batch.png"),
        ("context-", "tokens of context, one sequence", "step-context.png"),
    ):
        if runs := _runs(records, prefix):
            series = plots.median_series(runs, "contestant", plots.number_of, "itl_p50_s", 1e3)
            plots.draw_lines(folder / file, series, x_label, "decode step, ms", log_x=True)
            blocks += [f"### {x_label.capitalize()}", _image(folder, file, "decode step"), _step_table(series, x_label)]
    if waste := [one for one in _of_kind(records, "run") if "kv_waste" in one["engine"] and not one["is_peer"]]:
        rows = [["workload", "pages in use that hold no token"]]
        for name, own in _by(waste, "workload").items():
            shares = [one["engine"]["kv_waste"] for one in own]
            rows.append([name, f"{100 * statistics.median(shares):.1f} %"])
        blocks += ["### KV waste", table(rows)]
    return ["## How cost grows", *blocks] if blocks else []


def _step_table(series: plots.Series, x_label: str) -> str:
    columns = sorted({at for points in series.values() for at, _ in points})
    rows = [["step, ms", *(f"{at:g}" for at in columns)]]
    for name, points in series.items():
        known = dict(points)
        rows.append([name, *(f"{known[at]:.1f}" if at in known else "–" for at in columns)])
    return table(rows)


def _driver(records: Sequence[Record], folder: Path) -> list[str]:
    own = _of_kind(records, "driver")
    if not own:
        return []
    series = {
        "1 replica, by streams": [(one["num_streams"], 1e6 * one["driver_cpu_s_per_token"]) for one in own
                                  if one["num_replicas"] == 1],
    }  # fmt: skip
    plots.draw_lines(folder / "driver.png", series, "streams", "driver CPU, µs a token", log_x=True)
    what = "Replicas without a model; all streams together get about 2,000 tokens a second."
    return [
        "## What the driver costs",
        what,
        _image(folder, "driver.png", "driver CPU a token"),
        driver_load.to_table(own),
    ]


def _startup(records: Sequence[Record], folder: Path) -> list[str]:
    own = _of_kind(records, "startup")
    if not own:
        return []
    series = plots.median_series(own, "contestant", lambda one: one["weight_bytes"] / 2**20, "startup_s", 1.0)
    plots.draw_lines(folder / "startup.png", series, "weights, MiB", "start to first token, s")
    what = "Random weights in bfloat16, in the page cache; from the start of the process to the first token."
    return ["## Start-up against model size", what, _image(folder, "startup.png", "start-up"), startup.to_table(own)]


def _fleet(records: Sequence[Record], folder: Path) -> list[str]:
    own = _of_kind(records, "fleet")
    return ["## A fleet at rest", fleet.to_table(own)] if own else []


def _image(folder: Path, file: str, what: str) -> str:
    return f"![{what}]({folder.name}/{file})"


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _runs(records: Sequence[Record], *prefixes: str) -> list[Record]:
    return [record for record in _of_kind(records, "run") if record["workload"].startswith(prefixes)]


def _by(records: Sequence[Record], field: str) -> dict[str, list[Record]]:
    values = dict.fromkeys(record[field] for record in records)
    return {value: [one for one in records if one[field] == value] for value in values}


def _median(records: Sequence[Record], name: str) -> float:
    return float(statistics.median(record[name] for record in records))
