"""Traces on their way: joined clocks, messages in parts, the file for Perfetto, the picture."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardray.parallel.spans import Span, SpanKind
from shardray.runtime.cli.timeline import join_parts, summary, to_chrome
from shardray.runtime.cli.timeline_png import NoPictureError, draw
from shardray.runtime.client import ServerError
from shardray.runtime.cluster.reports import SpanReport
from shardray.runtime.cluster.trace import trace_meshes
from shardray.runtime.driver.driver import Driver
from shardray.v1 import control_pb2
from tests.serving import serving
from tests.stub_operator import StubOperator

MS = 1_000_000


def rank_trace(rank: int, *spans: tuple[str, str, int, int], **fields: Any) -> control_pb2.RankTrace:
    """Spans are (kind, name, begin in ms, duration in ms)."""
    found = [control_pb2.Span(kind=k, name=n, begin_ns=b * MS, duration_ns=d * MS) for k, n, b, d in spans]
    return control_pb2.RankTrace(rank=rank, tp_rank=rank, host="here", pid=10 + rank, spans=found, **fields)


RANKS = [
    rank_trace(0, ("collective", "all_reduce", 1002, 4), ("step", "step 1: 1 decodes", 1000, 10)),
    rank_trace(1, ("step", "step 1: 1 decodes", 1005, 5), clock_error_ns=2 * MS),
]


def test_a_timeline_begins_with_its_first_span_and_names_every_rank() -> None:
    timeline = json.loads(json.dumps(to_chrome(RANKS)))
    spans = [event for event in timeline["traceEvents"] if event["ph"] == "X"]
    assert [(span["pid"], span["cat"], span["ts"], span["dur"]) for span in spans] == [
        (0, "collective", 2000.0, 4000.0),
        (0, "step", 0.0, 10000.0),
        (1, "step", 5000.0, 5000.0),
    ]
    names = [event["args"]["name"] for event in timeline["traceEvents"] if event["name"] == "process_name"]
    assert names == ["replica 0 stage 0 tensor 0 (here pid 10)", "replica 0 stage 0 tensor 1 (here pid 11)"]
    assert timeline["otherData"][names[1]] == "its clock is an estimate, right to 2 ms"


def test_a_summary_says_what_steps_waited_for() -> None:
    assert summary(RANKS[0]) == "replica 0 stage 0 tensor 0 (here pid 10): 1 steps of 10.00 ms, collective 40%"
    assert summary(rank_trace(2)).endswith("idle")


def test_parts_of_a_rank_are_joined_in_their_order() -> None:
    parts = [rank_trace(1, ("step", "a", 1, 1)), rank_trace(0), rank_trace(1, ("step", "b", 2, 1))]
    assert [[span.name for span in rank.spans] for rank in join_parts(parts)] == [[], ["a", "b"]]


def test_a_picture_shows_every_rank(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    draw(RANKS, tmp_path / "two.png")
    draw([*RANKS, *RANKS], tmp_path / "four.png")
    two, four = imread(tmp_path / "two.png"), imread(tmp_path / "four.png")
    assert four.shape[0] > two.shape[0] > 100
    assert (abs(two[..., :3] - (0.933, 0.522, 0.290)) < 0.02).all(axis=-1).any(), "no collective is drawn"
    draw([rank_trace(0)], tmp_path / "idle.png")


def test_without_matplotlib_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NoPictureError, match=r"pip install 'shardray\[plot\]'"):
        draw(RANKS, tmp_path / "none.png")


class FarHost:
    """A host whose machine has another clock; it answers in the time that a network takes."""

    def __init__(self, node_id: str, ahead_ns: int) -> None:
        self.info = SimpleNamespace(node_id=node_id, host=node_id, pid=1)
        self._ahead_ns = ahead_ns
        self.began_ns = 0

    async def clock(self) -> int:
        await asyncio.sleep(0.002)
        now_ns = time.monotonic_ns() + self._ahead_ns
        await asyncio.sleep(0.001)
        return now_ns

    async def start_trace(self) -> None:
        self.began_ns = time.monotonic_ns()

    async def stop_trace(self) -> SpanReport:
        return SpanReport(spans=[Span(SpanKind.STEP, "step 1", self.began_ns + self._ahead_ns, 5)])


@pytest.mark.asyncio
async def test_clocks_of_other_machines_are_told_apart_within_what_is_said() -> None:
    hosts = [FarHost("a", 0), FarHost("a", 0), FarHost("b", 5_000 * MS)]
    mesh: Any = SimpleNamespace(hosts=hosts, tp_size=3)
    traces = await trace_meshes([(7, mesh)], 0.0)
    assert [(trace.replica_id, trace.tp_rank) for trace in traces] == [(7, 0), (7, 1), (7, 2)]
    errors = [abs(trace.spans[0].begin_ns - host.began_ns) for trace, host in zip(traces, hosts, strict=True)]
    assert [trace.clock_error_ns > 0 for trace in traces] == [False, False, True]
    assert errors[:2] == [0, 0]
    assert errors[2] <= traces[2].clock_error_ns < 1_000 * MS


@pytest.mark.asyncio
async def test_a_long_trace_comes_in_parts_and_bad_lengths_are_refused() -> None:
    operators: list[StubOperator] = []

    def make(driver: Driver) -> StubOperator:
        operators.append(StubOperator(driver))
        return operators[0]

    async with serving(None, operator=make) as up:
        parts = await up.client.trace(0.5)
        assert [(part.rank, len(part.spans)) for part in parts] == [(0, 20_000), (0, 10_000), (1, 0)]
        assert operators[0].asked == [0.5]
        for seconds in (0.0, -1.0, 61.0, float("nan")):
            with pytest.raises(ServerError, match="seconds") as caught:
                await up.client.trace(seconds)
            assert caught.value.code == "INVALID_ARGUMENT"
