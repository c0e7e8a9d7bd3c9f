"""Records → Markdown: the figures of each contestant, and the ratios that the targets ask for."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.targets import TARGETS, Target

Record = dict[str, Any]

_COLUMNS = (
    ("decode tok/s", "decode_tok_s", 1.0, "{:.1f}"),
    ("output tok/s", "output_tok_s", 1.0, "{:.1f}"),
    ("first token ms", "ttft_s", 1e3, "{:.0f}"),
    ("between tokens p50 / p99 ms", ("itl_p50_s", "itl_p99_s"), 1e3, "{:.1f}"),
    ("start s", "startup_s", 1.0, "{:.1f}"),  # to the first token
    ("peak RSS MiB", "peak_rss_bytes", 2**-20, "{:.0f}"),
    ("CPU ms/token", "cpu_s_per_token", 1e3, "{:.1f}"),
)
_LAST_COLUMNS = ("KV waste", "control ms/step", "same tokens as the first")


def read_records(paths: Iterable[Path]) -> list[Record]:
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def to_markdown(records: Sequence[Record], allow_busy: bool = False) -> str:
    """Tables of medians over the rounds. Runs beside other work are left out, unless ``allow_busy``."""
    failed = [record for record in records if "error" in record]
    whole = [record for record in records if "error" not in record]
    used = [record for record in whole if allow_busy or not record["busy"]]
    blocks = [_machine_line(records)] if records else []
    for workload in dict.fromkeys(record["workload"] for record in whole):
        blocks.append(f"### {workload}\n\n{_figures_table([r for r in used if r['workload'] == workload])}")
    blocks.append(f"### Ratios\n\n{_target_table(used)}")
    if len(used) < len(whole):
        blocks.append(f"{len(whole) - len(used)} of {len(whole)} runs left out: the machine was busy with other work.")
    blocks += sorted({f"Failed: {record['error']}" for record in failed})
    return "\n\n".join(blocks) + "\n"


def _machine_line(records: Sequence[Record]) -> str:
    record = records[0]
    machine = record["machine"]
    return (
        f"{record['model']} in {record['dtype']} on {machine['cpu']}, {machine['num_cores']} cores: reads "
        f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s, bf16 products {machine['bf16_flop_per_s'] / 1e12:.2f} TFLOP/s; "
        f"one stream can reach {machine['floor_tok_s']:.0f} tok/s at most."
    )


def _figures_table(records: Sequence[Record]) -> str:
    rows = [["contestant", "threads", "rounds", *(column[0] for column in _COLUMNS), *_LAST_COLUMNS]]
    for label in dict.fromkeys(record["contestant"] for record in records):
        own = [record for record in records if record["contestant"] == label]
        cells = [_cell(own, *column[1:]) for column in _COLUMNS]
        engine = [record["engine"] for record in own]
        waste, control = (_engine_cell(engine, name) for name in ("kv_waste", "control_s_per_step"))
        same = statistics.median(record["agreement"]["identical_share"] for record in own)
        rows.append([label, str(own[0]["num_threads"]), str(len(own)), *cells, waste, control, f"{100 * same:.0f} %"])
    return _table(rows)


def _cell(records: Sequence[Record], metric: str | tuple[str, ...], unit: float, form: str) -> str:
    """Median, and the range over the rounds if there are several."""
    if metric == "startup_s":  # the start has its own watch for other work
        records = [record for record in records if not record["startup_busy"]]
    if not records:
        return "–"
    if isinstance(metric, tuple):
        return " / ".join(form.format(statistics.median(_values(records, name)) * unit) for name in metric)
    values = [value * unit for value in _values(records, metric)]
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))}–{form.format(max(values))})"


def _engine_cell(figures: Sequence[dict[str, float]], name: str) -> str:
    values = [figure[name] for figure in figures if name in figure]
    if not values:
        return "–"
    middle = statistics.median(values)
    return f"{100 * middle:.1f} %" if name == "kv_waste" else f"{1e3 * middle:.2f}"


def _target_table(records: Sequence[Record]) -> str:
    rows = [["target", "workload", "contestant", "against", "ratio", "at least", "reached"]]
    for target in TARGETS:
        ratios = round_ratios(target, records)
        shown, reached = "not measured", "–"
        if ratios:
            middle = statistics.median(ratios)
            shown = f"{middle:.2f}" + (f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else "")
            reached = "yes" if middle >= target.at_least else "no"
        rivals = " or ".join(target.rivals)
        rows.append([target.what, target.workload, target.contestant, rivals, shown, f"{target.at_least:g}", reached])
    return _table(rows)


def round_ratios(target: Target, records: Sequence[Record]) -> list[float]:
    """The ratio of each round in which all of its contestants took part."""
    ratios = []
    mine = [record for record in records if record["workload"] == target.workload]
    for number in sorted({record["round"] for record in mine}):
        by_label = {record["contestant"]: record[target.metric] for record in mine if record["round"] == number}
        rivals = [value for label, value in by_label.items() if target.is_rival(label)]
        if target.contestant in by_label and all(rival in by_label for rival in target.rivals):
            ratios.append(target.ratio(by_label[target.contestant], rivals))
    return ratios


def _values(records: Sequence[Record], metric: str) -> list[float]:
    return [record[metric] for record in records]


def _table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(rows[0])
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
