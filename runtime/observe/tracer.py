"""OpenTelemetry traces: a span for each request, with its queue, prefill and decode inside.

Spans are made when a request has ended, from the times that it carries anyway: tokens pay nothing. They go out in a
thread of their own, in batches; a collector that does not answer costs the spans and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shardray import __version__
from shardray.runtime.config import TracingSettings
from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.observer import RequestObserver
from shardray.runtime.observe.trace_context import TRACE_CONTEXT

_EXPORT_S = 5.0  # for the collector to take a batch
_NS = 1_000_000_000


class Tracer(RequestObserver):
    """Sends spans to ``endpoint`` until ``stop``. ``then`` hears of ends too."""

    def __init__(self, settings: TracingSettings, model_id: str, then: RequestObserver) -> None:
        assert settings.endpoint is not None
        self._then = then
        self._parents: dict[LiveRequest, Mapping[str, str]] = {}
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
        if carrier := TRACE_CONTEXT.get():
            self._parents[live] = carrier

    def on_end(self, live: LiveRequest) -> None:
        self._then.on_end(live)
        context = self._propagator.extract(self._parents.pop(live, {}))
        entry, end = live.entry, live.stream.end
        attributes: dict[str, str | int] = {
            "gen_ai.request.model": self._model_id,
            "gen_ai.request.id": live.request_id,
            "gen_ai.request.max_tokens": entry.params.max_tokens,
            "gen_ai.usage.input_tokens": len(entry.prompt_ids),
            "gen_ai.usage.output_tokens": len(entry.sent_ids),
        }
        ended_s = time.monotonic()
        span = self._tracer.start_span(
            "request", context, SpanKind.SERVER, attributes, start_time=_ns(entry.accepted_s)
        )
        if end is not None and end.error:
            span.set_status(Status(StatusCode.ERROR, end.error))
        elif end is not None:
            span.set_attribute("gen_ai.response.finish_reasons", (str(end.reason or "stop"),))
        self._add_parts(live, trace.set_span_in_context(span, context), ended_s)
        span.end(_ns(ended_s))

    def _add_parts(self, live: LiveRequest, parent: object, ended_s: float) -> None:
        """Each begins where the one before ends; those that it did not come to are left out."""
        entry = live.entry
        begins = {"queue": entry.accepted_s, "prefill": entry.dispatched_s, "decode": entry.first_token_s}
        known = [(name, begin_s) for name, begin_s in begins.items() if begin_s is not None]
        for (name, begin_s), end_s in zip(known, [*(begin_s for _, begin_s in known[1:]), ended_s], strict=True):
            part = self._tracer.start_span(name, parent, start_time=_ns(begin_s))  # type: ignore[arg-type]
            if name != "queue" and live.replica_id is not None:
                part.set_attribute("shardray.replica_id", live.replica_id)
            part.end(_ns(end_s))


def _is_plain(endpoint: str) -> bool:
    return not endpoint.startswith("https://")


def _ns(monotonic_s: float) -> int:
    """On the calendar, in nanoseconds since 1970."""
    return time.time_ns() - round((time.monotonic() - monotonic_s) * _NS)
