"""What requests were like: how long each part of them took, how long they were, how they ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.observer import RequestObserver
from shardray.runtime.engine.request import FinishReason
from shardray.runtime.engine.traced import TracedStep
from shardray.runtime.observe.histogram import Histogram

# Seconds. Those of vLLM, so that its boards and recording rules read them; one and two milliseconds more at the start.
_TOKEN_S = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_NUM_TOKENS = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
    FinishReason.ERROR: "error",
}
_GOES_ON = "SuspendedError"  # under the next driver, which will see its end


class RequestMetrics(RequestObserver):
    """Histograms by the name under which Prometheus reads them, and ends by their reason. Filled in the driver's loop.

    ``then`` hears of requests and ends too: of tokens there is nobody else to tell.
    """

    def __init__(self, then: RequestObserver | None = None) -> None:
        self._then = then or RequestObserver()
        self.first_token_s = Histogram(_FIRST_TOKEN_S)
        self.inter_token_s = Histogram(_TOKEN_S)
        self.ends: Counter[str] = Counter(dict.fromkeys(_REASONS.values(), 0))
        self.histograms = {
            "vllm:time_to_first_token_seconds": self.first_token_s,
            "vllm:inter_token_latency_seconds": self.inter_token_s,
            "vllm:request_time_per_output_token_seconds": Histogram(_TOKEN_S),
            "vllm:e2e_request_latency_seconds": Histogram(_REQUEST_S),
            "vllm:request_queue_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_inference_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_prefill_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_decode_time_seconds": Histogram(_REQUEST_S),
            "vllm:request_prompt_tokens": Histogram(_NUM_TOKENS),
            "vllm:request_generation_tokens": Histogram(_NUM_TOKENS),
            "vllm:request_params_max_tokens": Histogram(_NUM_TOKENS),
        }

    def on_accept(self, live: LiveRequest) -> None:
        self._then.on_accept(live)

    def on_steps(self, live: LiveRequest, steps: Sequence[TracedStep]) -> None:
        self._then.on_steps(live, steps)

    def on_token(self, live: LiveRequest) -> None:
        now_s = time.monotonic()
        if live.last_token_s is not None:
            self.inter_token_s.observe(now_s - live.last_token_s)
        elif live.entry.first_token_s is None:  # else the first one came to an earlier driver
            self.first_token_s.observe(now_s - live.entry.accepted_s)
        live.last_token_s = now_s

    def on_end(self, live: LiveRequest) -> None:
        self._then.on_end(live)
        end, entry = live.stream.end, live.entry
        if end is None or end.error == _GOES_ON:
            return
        # Neither reason nor error: a stop string, which the driver finds.
        self.ends["error" if end.error else _REASONS[end.reason or FinishReason.STOP]] += 1
        self._observe("prompt_tokens", len(entry.prompt_ids))
        self._observe("generation_tokens", len(entry.sent_ids))
        self._observe("params_max_tokens", entry.params.max_tokens)
        self._observe_times(live, time.monotonic())

    def _observe_times(self, live: LiveRequest, ended_s: float) -> None:
        entry = live.entry
        self.histograms["vllm:e2e_request_latency_seconds"].observe(ended_s - entry.accepted_s)
        self._observe("queue_time_seconds", (entry.dispatched_s or ended_s) - entry.accepted_s)
        if entry.dispatched_s is not None:
            self._observe("inference_time_seconds", ended_s - entry.dispatched_s)
        if entry.dispatched_s is not None and entry.first_token_s is not None:
            last_s, num_later = live.last_token_s or ended_s, len(entry.sent_ids) - 1
            self._observe("prefill_time_seconds", entry.first_token_s - entry.dispatched_s)
            self._observe("decode_time_seconds", last_s - entry.first_token_s)
            if num_later > 0:
                self._observe("time_per_output_token_seconds", (last_s - entry.first_token_s) / num_later)

    def _observe(self, what: str, value: float) -> None:
        self.histograms[f"vllm:request_{what}"].observe(value)
