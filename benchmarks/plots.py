"""Records → PNG, for docs/performance.md. Needs the extra [plot]."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import Record
from benchmarks.workloads import MAIN

Series = dict[str, list[tuple[float, float]]]  # by label: points in order of x
_SIZE_INCHES = (6.4, 3.6)
_DPI = 100


def median_series(records: Sequence[Record], label: str, x: Callable[[Record], float], y: str, unit: float) -> Series:
    """A line for each value of the field ``label``; points at the median of records with the same ``x``."""
    found: dict[str, dict[float, list[float]]] = {}
    for one in records:
        if y in one:
            found.setdefault(str(one[label]), {}).setdefault(x(one), []).append(one[y] * unit)
    return {
        name: [(at, statistics.median(values)) for at, values in sorted(points.items())]
        for name, points in found.items()
    }


def number_of(record: Record) -> float:
    """What stands behind the dash in the name of its workload."""
    return float(record["workload"].rpartition("-")[2])


def draw_lines(
    path: Path, series: Series, x_label: str, y_label: str, log_x: bool = False, diagonal: bool = False
) -> None:
    """``diagonal``: a dotted line where y is x."""
    figure, axes = _figure()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.3, label=name)
    if diagonal:
        most = max(at for points in series.values() for at, _ in points)
        axes.plot([0, most], [0, most], color="0.7", linestyle=":", label="all of them")
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _save(figure, axes, path)


def draw_rates(path: Path, records: Sequence[Record]) -> None:
    """Output tokens a second of every contestant that serves whole machines, by main workload."""
    labels = [label for label in dict.fromkeys(one["contestant"] for one in records) if ":" not in label]
    figure, axes = _figure()
    for place, label in enumerate(labels):
        heights = []
        for workload in MAIN:
            own = [one["output_tok_s"] for one in records if (one["contestant"], one["workload"]) == (label, workload)]
            heights.append(statistics.median(own) if own else 0.0)
        width = 0.8 / len(labels)
        axes.bar([at + place * width for at in range(len(MAIN))], heights, width, label=label)
    axes.set_xticks([at + 0.4 - 0.4 / max(1, len(labels)) for at in range(len(MAIN))], MAIN)
    axes.set_ylabel("output tokens/s")
    _save(figure, axes, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Software": None})  # the same records give the same bytes
