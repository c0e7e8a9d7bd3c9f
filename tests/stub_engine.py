"""An engine without a model: it repeats the prompt, token by token, at a pace. For tests and load on the message plane.

It honours the contract of the real one: submit and cancel from any thread, ``run`` in one thread until stop, one list
of outputs a step, sleeping when there is nothing to do.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from shardray.runtime.engine.request import EngineRequest, EngineStats, FinishReason, ServedModel, TokenOutput

STUB_MODEL = ServedModel(vocab_size=300, max_model_len=512, eos_token_ids=(258,), num_kv_tokens=4096)


@dataclasses.dataclass
class _Sequence:
    request: EngineRequest
    num_generated: int

    def next_output(self, eos_token_ids: tuple[int, ...]) -> TokenOutput:
        """Position i of the output is position i of the endlessly repeated prompt."""
        params, prompt = self.request.params, self.request.prompt_ids
        token_id = prompt[self.num_generated % len(prompt)]
        self.num_generated += 1
        stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)
        reason = None
        if token_id in stops and self.num_generated > params.min_tokens:
            reason = FinishReason.STOP
        elif self.num_generated >= params.max_tokens:
            reason = FinishReason.LENGTH
        logprob = None if params.logprobs is None else -0.5
        top = tuple((token_id + rank, -0.5 - rank) for rank in range(params.logprobs or 0))
        return TokenOutput(self.request.request_id, token_id, logprob, top, reason)


class StubEngine:
    """``step_time_s`` paces it; ``run`` raises, as that of a broken mesh does, after ``fail_after_steps``, and in the
    step that would make token ``poison_position`` of a prompt that begins with ``poison_id``."""

    def __init__(
        self,
        step_time_s: float = 0.0,
        max_num_seqs: int = 8,
        info: ServedModel = STUB_MODEL,
        fail_after_steps: int | None = None,
        poison_id: int | None = None,
        poison_position: int = 0,
    ) -> None:
        self.info = info
        self._step_time_s = step_time_s
        self._max_num_seqs = max_num_seqs
        self._fail_after_steps = fail_after_steps
        self._poison_id = poison_id
        self._poison_position = poison_position
        self._waiting: list[EngineRequest] = []
        self._running: dict[str, _Sequence] = {}
        self._cancelled: list[str] = []
        self._news = threading.Condition()
        self._stopping = threading.Event()
        self._num_steps = 0
        self._num_output_tokens = 0
        self.num_forgotten = 0  # times that it was told to forget prefixes

    def submit(self, request: EngineRequest) -> None:
        request.check(self.info)
        with self._news:
            self._waiting.append(request)
            self._news.notify()

    def cancel(self, request_id: str) -> None:
        with self._news:
            self._cancelled.append(request_id)
            self._news.notify()

    def forget_prefixes(self) -> None:
        self.num_forgotten += 1

    def stop(self) -> None:
        self._stopping.set()
        with self._news:
            self._news.notify()

    def stats(self) -> EngineStats:
        with self._news:
            num_cached = sum(len(s.request.prompt_ids) + s.num_generated for s in self._running.values())
            return EngineStats(
                num_running=len(self._running),
                num_waiting=len(self._waiting),
                num_pages=256,
                num_used_pages=-(-num_cached // 16),
                num_cached_tokens=num_cached,
                block_size=16,
                num_steps=self._num_steps,
                num_output_tokens=self._num_output_tokens,
                step_time_s=self._step_time_s,
            )

    def run(self, publish: Callable[[list[TokenOutput]], None]) -> None:
        while not self._stopping.is_set():
            with self._news:
                self._news.wait_for(self._has_work)
                next_s = time.monotonic() + self._step_time_s  # a pace, whatever a step takes
                outputs = self._step()
            if outputs:
                publish(outputs)
            if self._fail_after_steps is not None and self._num_steps >= self._fail_after_steps:
                raise RuntimeError("stage 0, rank 1 did not answer")
            self._stopping.wait(max(0.0, next_s - time.monotonic()))

    def _has_work(self) -> bool:
        return bool(self._waiting or self._running or self._cancelled) or self._stopping.is_set()

    def _step(self) -> list[TokenOutput]:
        outputs = self._cancel_all()
        while self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting.pop(0)
            self._running[request.request_id] = _Sequence(request, len(request.generated_ids))
        if any(self._breaks(sequence) for sequence in self._running.values()):
            raise RuntimeError("a step was poisoned")
        tokens = [sequence.next_output(self.info.eos_token_ids) for sequence in self._running.values()]
        for output in tokens:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        self._num_steps += bool(tokens)
        self._num_output_tokens += len(tokens)
        return outputs + tokens

    def _breaks(self, sequence: _Sequence) -> bool:
        poisoned = sequence.request.prompt_ids[0] == self._poison_id
        return poisoned and sequence.num_generated == self._poison_position

    def _cancel_all(self) -> list[TokenOutput]:
        cancelled, self._cancelled = set(self._cancelled), []
        live = cancelled & (self._running.keys() | {request.request_id for request in self._waiting})
        self._waiting = [request for request in self._waiting if request.request_id not in live]
        for request_id in live:
            self._running.pop(request_id, None)
        return [TokenOutput(request_id, finish_reason=FinishReason.ABORTED) for request_id in sorted(live)]
