"""OpenTelemetry traces: a span for each request, with its queue, prefill and decode inside, and in these its steps.

A replica tells of the steps of requests that are sampled; all others pay nothing. The spans inside of a request's are
made when it has ended. They go out in a thread of their own, in batches; a collector that does not answer costs the
spans and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shardray import __version__
from shardray.runtime.config import TracingSettings
from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.observer import RequestObserver
from shardray.runtime.engine.traced import TracedStep
from shardray.runtime.observe.step_spans import StepSpans
from shardray.runtime.observe.trace_context import TRACE_CONTEXT

_EXPORT_S = 5.0  # for the collector to take a batch
_NS = 1_000_000_000


@dataclass
class _Traced:
    """A request in flight that is sampled. Its steps: those up to its first token, and those after it."""

    span: Span
    prefill: StepSpans = field(default_factory=StepSpans)
    decode: StepSpans = field(default_factory=StepSpans)


class Tracer(RequestObserver):
    """Sends spans to ``endpoint`` until ``stop``. ``then`` hears of ends too."""

    def __init__(self, settings: TracingSettings, model_id: str, then: RequestObserver) -> None:
        assert settings.endpoint is not None
        self._then = then
        self._traced: dict[LiveRequest, _Traced] = {}
        resource = Resource.create({"service.name": "shardray", "service.version": __version__})
        sampler = ParentBasedTraceIdRatio(settings.sample_ratio)
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(settings.endpoint, insecure=_is_plain(settings.endpoint), timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("shardray", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_id = model_id

    async def stop(self) -> None:
        """Send what is pending."""
        await asyncio.to_thread(self._provider.shutdown)

    def on_accept(self, live: LiveRequest) -> None:
        context = self._propagator.extract(TRACE_CONTEXT.get() or {})
        begin_ns = _ns(live.entry.accepted_s)
        span = self._tracer.start_span("request", context, SpanKind.SERVER, start_time=begin_ns)
        if span.is_recording():
            live.is_traced = True
            self._traced[live] = _Traced(span)

    def on_steps(self, live: LiveRequest, steps: Sequence[TracedStep]) -> None:
        if (traced := self._traced.get(live)) is not None:
            (traced.prefill if live.entry.first_token_s is None else traced.decode).add(steps)

    def on_end(self, live: LiveRequest) -> None:
        self._then.on_end(live)
        if (traced := self._traced.pop(live, None)) is None:
            return
        entry, end, span, ended_s = live.entry, live.stream.end, traced.span, time.monotonic()
        span.set_attributes(
            {
                "gen_ai.request.model": self._model_id,
                "gen_ai.request.id": live.request_id,
                "gen_ai.request.max_tokens": entry.params.max_tokens,
                "gen_ai.usage.input_tokens": len(entry.prompt_ids),
                "gen_ai.usage.output_tokens": len(entry.sent_ids),
            }
        )
        if end is not None and end.error:
            span.set_status(Status(StatusCode.ERROR, end.error))
        elif end is not None:
            span.set_attribute("gen_ai.response.finish_reasons", (str(end.reason or "stop"),))
        self._add_parts(live, traced, ended_s)
        span.end(_ns(ended_s))

    def _add_parts(self, live: LiveRequest, traced: _Traced, ended_s: float) -> None:
        """Each begins where the one before ends; those that it did not come to are left out."""
        entry, parent = live.entry, trace.set_span_in_context(traced.span)
        begins = {"queue": entry.accepted_s, "prefill": entry.dispatched_s, "decode": entry.first_token_s}
        known = [(name, begin_s) for name, begin_s in begins.items() if begin_s is not None]
        for (name, begin_s), end_s in zip(known, [*(begin_s for _, begin_s in known[1:]), ended_s], strict=True):
            part = self._tracer.start_span(name, parent, start_time=_ns(begin_s))
            if name != "queue":
                if live.replica_id is not None:
                    part.set_attribute("shardray.replica_id", live.replica_id)
                steps = traced.prefill if name == "prefill" else traced.decode
                steps.write(self._tracer, trace.set_span_in_context(part))
            part.end(_ns(end_s))


def _is_plain(endpoint: str) -> bool:
    return not endpoint.startswith("https://")


def _ns(monotonic_s: float) -> int:
    """On the calendar, in nanoseconds since 1970."""
    return time.time_ns() - round((time.monotonic() - monotonic_s) * _NS)
