"""A traced request of a real fleet of two stages: from its call through queue, prefill and decode to the stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.command import Command
from tests.model.zoo import save
from tests.observe.test_tracer import PARENT, TRACE, Collector, attributes, collector, generate

pytestmark = pytest.mark.integration
__all__ = ["collector"]
NUM_TOKENS = 40
SETTINGS = (
    "model.max_model_len=128", "model.dtype=float32", "engine.kv_memory_bytes=100KiB", "engine.max_num_seqs=4",
    "engine.block_size=4", "parallel.pipeline_parallel_size=2", "grpc.listen=127.0.0.1:0", "tracing.sample_ratio=0",
    "metrics.listen=127.0.0.1:0",
)  # fmt: skip


@pytest.fixture
def spans(collector: tuple[Collector, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Span]]:
    """Those of one call that is traced and one that is not."""
    seen, endpoint = collector
    folder = save("llama", tmp_path_factory.mktemp("llama"))
    settings = (f"model.source={folder}", f"tracing.endpoint={endpoint}", *SETTINGS)
    command = Command(("serve", "--json", *(option for setting in settings for option in ("--set", setting))))
    address = command.until_event("serving")["address"]
    asyncio.run(generate(address, NUM_TOKENS, traceparent=f"00-{TRACE}-{PARENT}-01"))
    asyncio.run(generate(address, NUM_TOKENS))
    command.process.terminate()
    _, stderr = command.process.communicate(timeout=60)
    assert (command.process.returncode, stderr) == (0, "")
    yield seen.spans
    assert command.left_behind() == []


def test_a_trace_goes_from_the_call_down_to_the_stages_of_each_step(spans: list[Span]) -> None:
    by_id = {span.span_id: span for span in spans}

    def path(span: Span) -> tuple[str, ...]:
        above = by_id.get(span.parent_span_id)
        return (span.name,) if above is None else (*path(above), span.name)

    assert {span.trace_id.hex() for span in spans} == {TRACE}
    paths = [path(span) for span in spans]
    assert paths.count(("request", "prefill", "step")) == 1
    assert paths.count(("request", "decode", "step")) == 16
    for stage in ("stage 0", "stage 1"):
        assert paths.count(("request", "prefill", "step", stage)) == 1
        assert paths.count(("request", "decode", "step", stage)) == 16
    steps = [span for span in spans if "step" in span.name]
    assert sum(attributes(span)["shardray.num_tokens"] for span in steps) >= 3 + NUM_TOKENS - 1
    for span in spans:
        above = by_id.get(span.parent_span_id)
        if above is not None:
            assert span.start_time_unix_nano >= above.start_time_unix_nano - 2_000_000
            assert span.end_time_unix_nano <= above.end_time_unix_nano + 2_000_000
