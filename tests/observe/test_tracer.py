"""Traces: a real collector's side of OTLP over gRPC gets a span for each request, under the client's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from shardray.runtime.config import Config, LimitsSettings, ModelSettings, TracingSettings
from shardray.runtime.observe.observation import Observation
from shardray.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.serving import serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.spans += [span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(0)


def observation(endpoint: str, sample_ratio: float = 1.0) -> Observation:
    tracing = TracingSettings(endpoint=endpoint, sample_ratio=sample_ratio)
    return Observation(Config(model=ModelSettings(source="stub"), tracing=tracing))


async def generate(address: str, max_tokens: int, **metadata: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(
            request_id="traced",
            token_ids=common_pb2.TokenIds(ids=[5, 6, 7]),
            sampling=common_pb2.SamplingParameters(max_tokens=max_tokens, ignore_eos=True),
        )
        async for _ in stub.Generate(request, metadata=tuple(metadata.items())):
            pass


def attributes(span: Span) -> dict[str, Any]:
    kinds = {entry.key: entry.value for entry in span.attributes}
    return {key: getattr(value, str(value.WhichOneof("value"))) for key, value in kinds.items()}


@pytest.mark.asyncio
async def test_a_request_is_a_span_of_its_callers_trace_with_its_parts_inside(collector: tuple[Collector, str]) -> None:
    seen, endpoint = collector
    watching = observation(endpoint)
    began_ns = time.time_ns()
    async with serving(None, observation=watching, step_time_s=0.01) as up:
        await generate(up.address, 8, traceparent=f"00-{TRACE}-{PARENT}-01")
    await watching.stop()
    spans = {span.name: span for span in seen.spans}
    assert set(spans) == {"request", "queue", "prefill", "decode"}
    request, parts = spans["request"], [spans[name] for name in ("queue", "prefill", "decode")]
    assert {span.trace_id.hex() for span in seen.spans} == {TRACE}
    assert request.parent_span_id.hex() == PARENT
    assert {part.parent_span_id for part in parts} == {request.span_id}
    ends = [request.start_time_unix_nano, *(part.end_time_unix_nano for part in parts)]
    starts = [part.start_time_unix_nano for part in parts]
    assert starts == pytest.approx(ends[:-1], abs=2e6)  # each begins where the one before ends
    assert began_ns < request.start_time_unix_nano < request.end_time_unix_nano < time.time_ns()
    assert ends[-1] == pytest.approx(request.end_time_unix_nano, abs=2e6)
    assert spans["decode"].end_time_unix_nano - spans["decode"].start_time_unix_nano > 50e6
    found = attributes(request)
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (3, 8)
    assert found["gen_ai.request.id"] == "traced"
    assert request.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.asyncio
async def test_what_its_caller_does_not_trace_is_not_traced_and_what_fails_says_so(
    collector: tuple[Collector, str],
) -> None:
    seen, endpoint = collector
    watching = observation(endpoint)
    limits = LimitsSettings(default_deadline_s=0.5)
    async with serving(None, limits=limits, observation=watching, step_time_s=0.02) as up:
        await generate(up.address, 2, traceparent=f"00-{TRACE}-{PARENT}-00")
        await generate(up.address, 2, traceparent="garbage")
        with pytest.raises(grpc.aio.AioRpcError):
            await generate(up.address, 400)
    await watching.stop()
    requests = [span for span in seen.spans if span.name == "request"]
    ends = [(span.status.code, span.status.message) for span in requests]
    assert ends == [(Status.STATUS_CODE_UNSET, ""), (Status.STATUS_CODE_ERROR, "DeadlineExceededError")]
    assert all(span.parent_span_id == b"" and span.trace_id.hex() != TRACE for span in requests)


@pytest.mark.asyncio
async def test_without_a_collector_requests_go_on_and_the_end_is_not_held_up() -> None:
    watching = observation("http://127.0.0.1:9")
    async with serving(None, observation=watching) as up:
        await generate(up.address, 5)
    began_s = time.monotonic()
    await watching.stop()
    assert time.monotonic() - began_s < 8
