"""The engine's loop with a real tiny model on one rank: submit, cancel, stop, stats, failures, and idling."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardray.runtime.engine.assignment import ShardAssignment
from shardray.runtime.engine.loop import Engine
from shardray.runtime.engine.request import EngineRequest, FieldError, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.engine.runner import ShardRunner
from shardray.runtime.engine.shard import Shard, form_shard
from tests.tiny_models import save_llama

WAIT_S = 20.0
MAX_MODEL_LEN, NUM_PAGES, NUM_TOKENS = 1024, 150, 900
LONG = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)


@pytest.fixture
def shard(folder: Path) -> Iterator[Shard]:
    page_bytes = 2 * 2 * 16 * 3 * 16 * 4  # keys and values, layers, tokens, KV heads, elements, bytes
    shard = form_shard(
        ShardAssignment(
            epoch="loop",
            secret="",
            rank=0,
            tp_size=1,
            pp_size=1,
            nodes=("here",),
            store_host="",
            store_port=0,
            bind_host="127.0.0.1",
            device="cpu",
            model_dir=str(folder),
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=3,
            max_num_batched_tokens=64,
            kv_memory_bytes=NUM_PAGES * page_bytes,
        )
    )
    yield shard
    shard.close()


class Running:
    """An engine that runs in a thread, with what it has published."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.cpu_s = 0.0
        self._published: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        self._kept: dict[str, list[TokenOutput]] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def next_of(self, request_id: str) -> TokenOutput:
        while not self._kept.get(request_id):
            output = self._published.get(timeout=WAIT_S)
            self._kept.setdefault(output.request_id, []).append(output)
        return self._kept[request_id].pop(0)

    def rest_of(self, request_id: str) -> list[TokenOutput]:
        outputs = [self.next_of(request_id)]
        while outputs[-1].finish_reason is None:
            outputs.append(self.next_of(request_id))
        return outputs

    def stop(self) -> None:
        self.engine.stop()
        self.join()

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        began = time.thread_time()
        try:
            self.engine.run(lambda outputs: [self._published.put(output) for output in outputs])
        except Exception as error:
            self.failure = error
        self.cpu_s = time.thread_time() - began


@pytest.fixture
def running(shard: Shard) -> Iterator[Running]:
    running = Running(shard.engine)
    yield running
    running.stop()


def request(request_id: str, prompt_len: int = 20, params: SamplingParams = LONG, seed: int = 3) -> EngineRequest:
    prompt_ids = tuple(3 + (seed * position) % 240 for position in range(prompt_len))
    return EngineRequest(request_id=request_id, prompt_ids=prompt_ids, params=params)


def wait_until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + WAIT_S
    while engine.stats().num_running or engine.stats().num_waiting or engine.stats().num_used_pages:
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.005)


def test_a_request_gets_its_tokens_and_then_the_engine_is_empty(running: Running) -> None:
    running.engine.submit(request("a", params=SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)))
    outputs = running.rest_of("a")
    assert [output.token_id is not None for output in outputs] == [True] * 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    wait_until_idle(running.engine)
    stats = running.engine.stats()
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (20, 5)
    assert stats.num_steps >= 5
    assert stats.step_time_s > 0
    assert stats.plan_time_s > 0


def test_a_running_request_that_is_cancelled_frees_its_pages(running: Running) -> None:
    running.engine.submit(request("a"))
    running.next_of("a")
    running.engine.cancel("a")
    last = running.rest_of("a")[-1]
    assert last.finish_reason is FinishReason.ABORTED
    wait_until_idle(running.engine)
    assert running.engine.stats().num_output_tokens < NUM_TOKENS


def test_a_waiting_request_that_is_cancelled_never_runs(running: Running) -> None:
    for name in "abc":  # all three slots
        running.engine.submit(request(name))
        running.next_of(name)
    running.engine.submit(request("waiting"))
    running.engine.cancel("waiting")
    assert running.rest_of("waiting") == [TokenOutput("waiting", finish_reason=FinishReason.ABORTED)]
    for name in "abc":
        running.engine.cancel(name)
        running.rest_of(name)
    wait_until_idle(running.engine)


def test_cancelling_what_is_unknown_or_over_is_harmless(running: Running) -> None:
    running.engine.cancel("never heard of")
    running.engine.submit(request("a", params=SamplingParams(max_tokens=1)))
    running.rest_of("a")
    running.engine.cancel("a")
    running.engine.cancel("a")
    running.engine.submit(request("b", params=SamplingParams(max_tokens=1)))
    running.rest_of("b")
    assert running.failure is None


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request("a", prompt_len=0), "prompt"),
        (request("a", prompt_len=200), "max_tokens"),
        (EngineRequest(request_id="a", prompt_ids=(251,), params=LONG), "prompt"),
        (request("a", params=SamplingParams(max_tokens=5, stop_token_ids=(999,))), "logit_bias or stop_token_ids"),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_once(shard: Shard, bad: EngineRequest, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        shard.engine.submit(bad)
    assert caught.value.field == field


def test_a_second_request_of_the_same_id_does_not_harm_the_first(running: Running) -> None:
    running.engine.submit(request("a"))
    first = running.next_of("a")
    running.engine.submit(request("a", seed=5))
    assert first.token_id is not None
    outputs = running.rest_of("a")
    while outputs[-1].finish_reason is FinishReason.ERROR:
        outputs = running.rest_of("a")
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert running.failure is None


def test_stop_returns_after_the_step_at_hand_and_the_engine_can_go_on(shard: Shard) -> None:
    engine = shard.engine
    running = Running(engine)
    engine.submit(request("a"))
    first = [running.next_of("a")]
    running.stop()
    assert running.failure is None
    assert engine.stats().num_running == 1
    again = Running(engine)
    while not running._published.empty():
        first.append(running._published.get())
    rest = again.rest_of("a")
    again.stop()
    assert len(first) + len(rest) == NUM_TOKENS


def test_stats_say_what_the_pages_hold(running: Running) -> None:
    running.engine.submit(request("a", prompt_len=40))
    for _ in range(10):
        running.next_of("a")
    stats = running.engine.stats()
    assert stats.num_pages == NUM_PAGES
    assert stats.num_running == 1
    assert 40 <= stats.num_cached_tokens <= 16 * stats.num_used_pages
    assert 0.0 <= stats.kv_waste < 1.0
    assert stats.kv_waste == 1.0 - stats.num_cached_tokens / (16 * stats.num_used_pages)
    running.engine.cancel("a")
    running.rest_of("a")
    wait_until_idle(running.engine)
    assert running.engine.stats().kv_waste == 0.0


def test_an_exception_of_the_runner_comes_out_of_run(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = shard._runner._decoder

    class Broken:
        """It breaks when a step begins; a step that is under way may still ask it for the rest."""

        def __call__(self, *arguments: object) -> torch.Tensor:
            raise RuntimeError("a layer broke")

        def __getattr__(self, name: str) -> object:
            return getattr(decoder, name)

    running = Running(shard.engine)
    running.engine.submit(request("a"))
    running.next_of("a")
    monkeypatch.setattr(shard._runner, "_decoder", Broken())
    running.join()
    assert isinstance(running.failure, RuntimeError)
    assert str(running.failure) == "a layer broke"


def test_recorded_steps_that_are_forgotten_while_one_is_launched_break_nothing(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = shard._runner._recorded
    assert recorded is not None
    reads = iter([recorded])  # by the second look another thread has forgotten them
    monkeypatch.setattr(ShardRunner, "_recorded", property(lambda runner: next(reads, None)), raising=False)
    running = Running(shard.engine)
    running.engine.submit(request("a", params=SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)))
    assert len(running.rest_of("a")) == 3
    running.stop()


def test_a_shard_that_is_broken_off_before_its_engine_runs_starts_nothing(shard: Shard) -> None:
    num_threads = threading.active_count()
    shard.abort()
    assert threading.active_count() == num_threads
    shard.engine.run(lambda outputs: None)  # returns at once


def test_an_idle_engine_uses_no_cpu(shard: Shard) -> None:
    running = Running(shard.engine)
    time.sleep(0.3)
    running.stop()
    assert running.cpu_s < 0.005


def test_requests_from_many_threads_all_end(running: Running) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

    def submit(thread: int) -> None:
        for index in range(5):
            running.engine.submit(request(f"{thread}-{index}", prompt_len=1 + thread, params=params))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread_number in range(6):
        for index in range(5):
            assert len(running.rest_of(f"{thread_number}-{index}")) == 4
    wait_until_idle(running.engine)


def test_an_idle_engine_looks_at_no_page_however_many_there_are(shard: Shard) -> None:
    limits = replace(shard.engine._limits, num_pages=500_000)
    engine = Engine(limits, shard.engine._executor, shard.engine.info)
    for number in range(20):  # each is followed by a moment without work
        engine.cancel(f"unknown {number}")
    running = Running(engine)
    while not engine._inbox.empty():
        time.sleep(0.01)
    running.stop()
    assert running.cpu_s < 0.5  # a walk through the pages takes 0.1 s
