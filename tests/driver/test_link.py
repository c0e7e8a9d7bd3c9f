"""The stream between driver and leader, over a real socket to a real process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from shardray.parallel.credentials import Credentials
from shardray.runtime.cluster.messages import Rejection
from shardray.runtime.driver.link import LinkError, ReplicaLink
from shardray.runtime.engine.request import EngineRequest, EngineStats, FinishReason, SamplingParams, TokenOutput
from tests.serving import eventually
from tests.stub_replica import SECRET, StubReplica

pytestmark = pytest.mark.asyncio


class Recorder:
    """Keeps what a link reports."""

    def __init__(self) -> None:
        self.batches: list[list[TokenOutput]] = []
        self.rejections: list[Rejection] = []
        self.stats: list[EngineStats] = []
        self.link = ReplicaLink(self._on_events, self.stats.append)

    @property
    def outputs(self) -> list[TokenOutput]:
        return [output for batch in self.batches for output in batch]

    def ended(self, request_id: str) -> bool:
        return any(output.request_id == request_id and output.finish_reason for output in self.outputs)

    def _on_events(self, outputs: list[TokenOutput], rejections: list[Rejection]) -> None:
        self.batches.append(outputs)
        self.rejections += rejections


def make_request(request_id: str, max_tokens: int = 5, generated: tuple[int, ...] = ()) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens)
    return EngineRequest(request_id=request_id, prompt_ids=(10, 11, 12), generated_ids=generated, params=params)


@pytest.fixture
def slow_replica() -> Iterator[StubReplica]:
    replica = StubReplica(step_time_s=0.02)
    yield replica
    replica.kill()


async def test_tokens_of_one_step_come_in_one_message(slow_replica: StubReplica) -> None:
    recorder = Recorder()
    model = await recorder.link.connect(slow_replica.address, SECRET)
    assert (model.vocab_size, model.max_model_len) == (300, 512)
    for request_id in ("a", "b", "c"):
        recorder.link.submit(make_request(request_id))
    await eventually(lambda: all(recorder.ended(request_id) for request_id in "abc"))
    assert [o.token_id for o in recorder.outputs if o.request_id == "b"] == [10, 11, 12, 10, 11]
    assert max(len(batch) for batch in recorder.batches) == 3
    await recorder.link.close()
    assert await recorder.link.closed == "the driver closed the link"


async def test_a_request_goes_on_behind_the_tokens_that_another_mesh_sent(slow_replica: StubReplica) -> None:
    recorder = Recorder()
    await recorder.link.connect(slow_replica.address, SECRET)
    recorder.link.submit(make_request("a", max_tokens=4, generated=(10, 11)))
    await eventually(lambda: recorder.ended("a"))
    assert [output.token_id for output in recorder.outputs] == [12, 10]
    await recorder.link.close()


async def test_a_cancelled_request_ends_as_aborted(slow_replica: StubReplica) -> None:
    recorder = Recorder()
    await recorder.link.connect(slow_replica.address, SECRET)
    recorder.link.submit(make_request("a", max_tokens=400))
    await eventually(lambda: bool(recorder.outputs))
    recorder.link.cancel("a")
    recorder.link.cancel("never seen")
    await eventually(lambda: recorder.ended("a"))
    assert recorder.outputs[-1].finish_reason is FinishReason.ABORTED
    await recorder.link.close()


async def test_a_request_that_can_never_run_is_rejected_with_the_field(slow_replica: StubReplica) -> None:
    recorder = Recorder()
    await recorder.link.connect(slow_replica.address, SECRET)
    recorder.link.submit(make_request("a", max_tokens=100_000))
    await eventually(lambda: bool(recorder.rejections))
    assert (recorder.rejections[0].request_id, recorder.rejections[0].field) == ("a", "max_tokens")
    await recorder.link.close()


async def test_statistics_come_at_once_when_the_engine_falls_idle(slow_replica: StubReplica) -> None:
    recorder = Recorder()
    await recorder.link.connect(slow_replica.address, SECRET)
    recorder.link.submit(make_request("a", max_tokens=3))
    await eventually(lambda: recorder.ended("a"))
    # In the very message that brings the last token.
    assert (recorder.stats[-1].num_output_tokens, recorder.stats[-1].num_running) == (3, 0)
    num_seen = len(recorder.stats)
    await asyncio.sleep(0.7)
    assert len(recorder.stats) == num_seen, "an idle engine has nothing to report"
    await recorder.link.close()


async def test_a_driver_with_the_wrong_secret_is_turned_away(slow_replica: StubReplica) -> None:
    for secret in ("", "wrong"):
        with pytest.raises(LinkError, match="another secret"):
            await Recorder().link.connect(slow_replica.address, Credentials("e", secret))


async def test_a_leader_that_is_not_there_is_reported_in_one_line() -> None:
    with pytest.raises(LinkError, match="refused") as caught:
        await Recorder().link.connect("127.0.0.1:1", SECRET)
    assert "\n" not in str(caught.value)


async def test_a_leader_that_says_nothing_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(LinkError, match=r"did not answer within 0\.2 s"):
            await Recorder().link.connect(f"127.0.0.1:{silent.getsockname()[1]}", SECRET, timeout_s=0.2)


async def test_a_killed_leader_closes_the_link_with_a_reason(slow_replica: StubReplica) -> None:
    recorder = Recorder()
    await recorder.link.connect(slow_replica.address, SECRET)
    slow_replica.kill()
    assert "lost" in await asyncio.wait_for(recorder.link.closed, 5)


async def test_a_broken_mesh_closes_the_link_with_its_reason_after_the_last_tokens() -> None:
    replica = StubReplica(fail_after_steps=3)
    recorder = Recorder()
    await recorder.link.connect(replica.address, SECRET)
    recorder.link.submit(make_request("a", max_tokens=100))
    assert await asyncio.wait_for(recorder.link.closed, 5) == "stage 0, rank 1 did not answer"
    assert len(recorder.outputs) == 3
    replica.kill()


async def test_a_lost_driver_leaves_nothing_running(slow_replica: StubReplica) -> None:
    first, second = Recorder(), Recorder()
    await first.link.connect(slow_replica.address, SECRET)
    await second.link.connect(slow_replica.address, SECRET)
    first.link.submit(make_request("a", max_tokens=400))
    await eventually(lambda: bool(first.outputs))
    await first.link.close()
    await eventually(lambda: bool(second.stats) and second.stats[-1].num_running == 0)
    second.link.submit(make_request("b", max_tokens=2))
    await eventually(lambda: second.ended("b"))
    assert second.stats[-1].num_output_tokens < 400
    await second.link.close()
