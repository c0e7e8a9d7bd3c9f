"""However long a request is, its steps are few spans, and none is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shardray.runtime.engine.traced import StageTime, TracedStep
from shardray.runtime.observe.step_spans import StepSpans

MS = 1_000_000


def make_step(index: int, num_stages: int = 2) -> TracedStep:
    """Of 10 ms, its stages of 3 ms one after the other."""
    begin_ns = 1_000 * MS + 10 * MS * index
    stages = tuple(StageTime(begin_ns + 3 * MS * stage, 3 * MS) for stage in range(num_stages))
    return TracedStep(index, begin_ns, 10 * MS, 1, 8, stages)


def written(steps: list[TracedStep]) -> tuple[ReadableSpan, ...]:
    exporter, provider, spans = InMemorySpanExporter(), TracerProvider(), StepSpans()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for step in steps:
        spans.add([step])
    spans.write(provider.get_tracer("test"), trace.set_span_in_context(trace.INVALID_SPAN))
    return exporter.get_finished_spans()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize(
    ("num_steps", "num_spans"), [(0, 0), (1, 1), (16, 16), (18, 17), (80, 17), (82, 18), (1040, 32)]
)
def test_first_steps_are_spans_and_later_ones_many_in_one(num_steps: int, num_spans: int) -> None:
    spans = [span for span in written([make_step(i) for i in range(num_steps)]) if "step" in span.name]
    assert len(spans) == num_spans
    assert sum(attributes(span)["shardray.num_steps"] for span in spans) == num_steps
    assert sum(attributes(span)["shardray.steps_s"] for span in spans) == pytest.approx(0.01 * num_steps)
    ends = [span.end_time for span in spans]
    assert [span.start_time for span in spans[1:]] == ends[:-1]


def test_a_step_has_its_stages_inside_and_a_span_of_many_their_sums() -> None:
    spans = written([make_step(i) for i in range(30)])
    first, many = next(s for s in spans if s.name == "step"), next(s for s in spans if s.name == "14 steps")
    inside = [span for span in spans if span.parent is not None and span.parent.span_id == first.context.span_id]
    assert [(span.name, span.start_time) for span in inside] == [("stage 0", 1000 * MS), ("stage 1", 1003 * MS)]
    assert attributes(many)["shardray.stages_s"] == pytest.approx((14 * 0.003, 14 * 0.003))
    assert not any(span.parent is not None and span.parent.span_id == many.context.span_id for span in spans)


def test_a_mesh_of_another_number_of_stages_may_take_over() -> None:
    steps = [make_step(i, num_stages=1 if i < 20 else 3) for i in range(40)]
    [many] = [span for span in written(steps) if span.name == "24 steps"]
    assert attributes(many)["shardray.stages_s"] == pytest.approx((24 * 0.003, 20 * 0.003, 20 * 0.003))
