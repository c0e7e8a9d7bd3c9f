"""Records → Markdown: the figures of each contestant, and how they stand against the targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import BUSY_CORES
from benchmarks.targets import TARGETS, Ratio, Reading, Target, is_reached
from benchmarks.workloads import SAMPLED

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


def quiet(records: Sequence[Record], allow_busy: bool = False) -> list[Record]:
    """Those that say something: not failed, and not measured beside other work."""
    return [one for one in records if "error" not in one and (allow_busy or not one.get("busy"))]


def to_markdown(records: Sequence[Record], allow_busy: bool = False) -> str:
    """Tables of medians over the rounds. Runs beside other work are left out, unless ``allow_busy``."""
    used = quiet(records, allow_busy)
    runs = [record for record in used if record["kind"] == "run"]
    blocks = [machine_line(runs)] if runs else []
    blocks += [f"### {name}\n\n{figures_table(runs, name)}" for name in workloads_of(runs)]
    blocks += [f"### Targets\n\n{target_table(used)}", *omissions(records, allow_busy)]
    return "\n\n".join(blocks) + "\n"


def workloads_of(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["workload"] for record in records))


def machine_line(records: Sequence[Record]) -> str:
    """What the machine could do, measured before each round."""
    machine = records[0]["machine"]
    reads, products, floors = (
        _spread([one["machine"][name] * unit for one in records], "{:.1f}")
        for name, unit in (("read_bytes_per_s", 1e-9), ("bf16_flop_per_s", 1e-12), ("floor_tok_s", 1.0))
    )
    return (
        f"{records[0]['model']} in {records[0]['dtype']} on {machine['cpu']}, {machine['num_cores']} cores: reads "
        f"{reads} GB/s, bf16 products {products} TFLOP/s; one stream can reach {floors} tok/s at most: the weights are "
        f"read once a token."
    )


def omissions(records: Sequence[Record], allow_busy: bool = False) -> list[str]:
    """What the tables leave out, and what failed."""
    whole = [record for record in records if "error" not in record]
    num_busy = len(whole) - len(quiet(records, allow_busy))
    lines = []
    if num_busy:
        lines.append(
            f"{num_busy} of {len(whole)} runs left out: beside them the machine was busy with other work "
            f"(more than {BUSY_CORES:g} of a core, time stolen by other guests included)."
        )
    return lines + sorted({f"Failed: {record['error']}" for record in records if "error" in record})


def figures_table(records: Sequence[Record], workload: str) -> str:
    rows = [["contestant", "threads", "rounds", *(column[0] for column in _COLUMNS), *_LAST_COLUMNS]]
    records = [record for record in records if record["workload"] == workload]
    for label in dict.fromkeys(record["contestant"] for record in records):
        own = [record for record in records if record["contestant"] == label]
        cells = [_cell(own, *column[1:]) for column in _COLUMNS]
        engine = [record["engine"] for record in own]
        waste, control = (_engine_cell(engine, name) for name in ("kv_waste", "control_s_per_step"))
        share = statistics.median(record["agreement"]["identical_share"] for record in own)
        same = "–" if workload == SAMPLED else f"{100 * share:.0f} %"  # each draws by its own random numbers
        rows.append([label, str(own[0]["num_threads"]), str(len(own)), *cells, waste, control, same])
    return table(rows)


def _cell(records: Sequence[Record], metric: str | tuple[str, ...], unit: float, form: str) -> str:
    """Median, and the range over the rounds if there are several."""
    if metric == "startup_s":  # the start has its own watch for other work
        records = [record for record in records if not record["startup_busy"]]
    if not records:
        return "–"
    if isinstance(metric, tuple):
        return " / ".join(form.format(statistics.median(values_of(records, name)) * unit) for name in metric)
    return _spread([value * unit for value in values_of(records, metric)], form)


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def _engine_cell(figures: Sequence[dict[str, float]], name: str) -> str:
    values = [figure[name] for figure in figures if name in figure]
    if not values:
        return "–"
    middle = statistics.median(values)
    return f"{100 * middle:.1f} %" if name == "kv_waste" else f"{1e3 * middle:.2f}"


def target_table(records: Sequence[Record]) -> str:
    """Every target with its figure, reached or not. ``records`` are those that ``quiet`` leaves."""
    rows = [["figure", "workload", "to reach", "measured", "rounds", "against", "reached"]]
    for target in TARGETS:
        reading = target.read(records)
        sign = "≤" if target.at_most else "≥"
        rows.append(
            [
                target.what,
                target.workload or "–",
                f"{sign} {target.limit:g}{target.unit}",
                _shown(target, reading),
                str(len(reading.values) or "–"),
                _against(target, reading),
                "–" if not reading.values else "yes" if is_reached(target, reading.middle) else "**no**",
            ]
        )
    return table(rows)


def _shown(target: Target, reading: Reading) -> str:
    if not reading.values:
        return "not measured"
    return _spread(reading.values, "{:.2f}") + target.unit


def _against(target: Target, reading: Reading) -> str:
    return reading.rival or "–" if isinstance(target, Ratio) else "–"


def values_of(records: Sequence[Record], metric: str) -> list[float]:
    return [record[metric] for record in records]


def table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(rows[0])
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
