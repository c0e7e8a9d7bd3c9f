"""A picture of a trace: a lane for each rank, steps as bars, what they waited in on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardray.runtime.cli.timeline import label
from shardray.v1 import control_pb2

_COLOURS = {"step": "#4878cf", "collective": "#ee854a", "hand-over": "#2e7d32", "bubble": "#c4c4c4"}
_HEIGHTS = {"step": 0.8}  # of a lane; what happens within a step is narrower
_MAX_STEPS = 10  # that are shown: more are a blur


class NoPictureError(Exception):
    """matplotlib is not installed."""


def draw(ranks: Sequence[control_pb2.RankTrace], path: Path) -> None:
    """Some steps from the middle of the trace. Raises NoPictureError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise NoPictureError("--png needs matplotlib: pip install 'shardray[plot]'") from error
    begin_ns, end_ns = _window(ranks)
    figure = Figure(figsize=(12, 1.2 + 0.7 * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for lane, rank in enumerate(ranks):
        for kind, colour in _COLOURS.items():
            bars = [
                ((span.begin_ns - begin_ns) / 1e6, span.duration_ns / 1e6)
                for span in rank.spans
                if span.kind == kind and span.begin_ns <= end_ns and span.begin_ns + span.duration_ns >= begin_ns
            ]
            height = _HEIGHTS.get(kind, 0.5)
            edge = "white" if kind == "step" else "none"
            axes.broken_barh(bars, (lane - height / 2, height), facecolors=colour, edgecolors=edge)
    axes.set_xlim(0, (end_ns - begin_ns) / 1e6)
    axes.set_xlabel("ms")
    axes.set_yticks(range(len(ranks)), [label(rank).partition(" (")[0] for rank in ranks])
    axes.invert_yaxis()
    shown = {span.kind for rank in ranks for span in rank.spans}
    handles = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items() if kind in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(handles)), frameon=False)
    figure.savefig(path, dpi=110)


def _window(ranks: Sequence[control_pb2.RankTrace]) -> tuple[int, int]:
    """(begin, end) in ns of the steps in the middle of the rank that made most."""
    steps = max(([span for span in rank.spans if span.kind == "step"] for rank in ranks), key=len, default=[])
    if not steps:
        return 0, 1
    first = max(0, (len(steps) - _MAX_STEPS) // 2)
    shown = steps[first : first + _MAX_STEPS]
    return shown[0].begin_ns, shown[-1].begin_ns + shown[-1].duration_ns
