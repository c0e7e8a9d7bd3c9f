"""The steps of one request as spans: each of the first with its stages inside, and one span for many later ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.trace import Tracer, set_span_in_context

from shardray.runtime.engine.traced import StageTime, TracedStep

_NUM_SINGLE = 16  # steps with a span of their own
_NUM_TOGETHER = 64  # steps of one span after these
_NS = 1e-9


@dataclass
class _Group:
    """Steps in a row, added up."""

    first: TracedStep
    end_ns: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_batched_tokens: int = 0
    steps_ns: int = 0
    stages_ns: list[int] = field(default_factory=list)

    def add(self, step: TracedStep) -> None:
        """A mesh of another number of stages may have taken over."""
        self.end_ns = step.begin_ns + step.duration_ns
        self.num_steps += 1
        self.num_tokens += step.num_tokens
        self.num_batched_tokens += step.num_batched_tokens
        self.steps_ns += step.duration_ns
        self.stages_ns += [0] * (len(step.stages) - len(self.stages_ns))
        for index, stage in enumerate(step.stages):
            self.stages_ns[index] += stage.duration_ns

    def attributes(self) -> dict[str, int | float | tuple[float, ...]]:
        return {
            "shardray.first_step": self.first.step,
            "shardray.num_steps": self.num_steps,
            "shardray.num_tokens": self.num_tokens,
            "shardray.num_batched_tokens": self.num_batched_tokens,
            "shardray.steps_s": self.steps_ns * _NS,
            "shardray.stages_s": tuple(stage_ns * _NS for stage_ns in self.stages_ns),
        }


class StepSpans:
    """A few bytes for each of the first steps, then for every so many: bounded, however long a request is."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    def add(self, steps: Sequence[TracedStep]) -> None:
        for step in steps:
            if len(self._groups) <= _NUM_SINGLE or self._groups[-1].num_steps == _NUM_TOGETHER:
                self._groups.append(_Group(step))
            self._groups[-1].add(step)

    def write(self, tracer: Tracer, parent: Context) -> None:
        """As spans inside of ``parent``'s. Each machine's times are by its own clock."""
        for group in self._groups:
            name = "step" if group.num_steps == 1 else f"{group.num_steps} steps"
            span = tracer.start_span(name, parent, attributes=group.attributes(), start_time=group.first.begin_ns)
            if group.num_steps == 1:
                _write_stages(tracer, set_span_in_context(span), group.first.stages)
            span.end(group.end_ns)


def _write_stages(tracer: Tracer, parent: Context, stages: Sequence[StageTime]) -> None:
    for index, stage in enumerate(stages):
        span = tracer.start_span(f"stage {index}", parent, start_time=stage.begin_ns)
        span.end(stage.begin_ns + stage.duration_ns)
