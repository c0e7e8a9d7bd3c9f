"""Every metric: name, type, labels, unit, meaning. What is exported, and what docs/operations.md says, is made of it.

Names of vLLM stand where the meaning is that of vLLM, so that boards, alerts and autoscalers made for it work. Counters
are read under their names with ``_total`` behind, histograms with ``_bucket``, ``_sum`` and ``_count``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODEL = ("model_name",)
ENGINE = ("model_name", "engine")
SHARD = ("model_name", "engine", "stage", "tensor", "host", "device")


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    unit: str
    meaning: str

    @property
    def exported_name(self) -> str:
        """As a scrape shows it; a histogram has three of them."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


METRICS = (
    Metric("vllm:num_requests_running", "gauge", ENGINE, "requests", "requests that a step of the replica computes"),
    Metric(
        "vllm:num_requests_waiting", "gauge", ENGINE, "requests",
        'requests that wait in a replica for a place in its batch or for pages; `engine="driver"`: in the driver, for '
        "any replica",
    ),
    Metric("vllm:kv_cache_usage_perc", "gauge", ENGINE, "0 to 1", "share of the pages of the KV cache in use"),
    Metric("vllm:num_preemptions", "counter", ENGINE, "times", "a request gave up its pages, to be computed again"),
    Metric("vllm:prompt_tokens", "counter", ENGINE, "tokens", "prompt tokens read"),
    Metric(
        "vllm:prefix_cache_queries", "counter", ENGINE, "tokens",
        "tokens of requests that started, those that started again included",
    ),
    Metric("vllm:prefix_cache_hits", "counter", ENGINE, "tokens", "those of them that had been computed before"),
    Metric("vllm:generation_tokens", "counter", ENGINE, "tokens", "tokens generated"),
    Metric("vllm:spec_decode_num_draft_tokens", "counter", ENGINE, "tokens", "tokens guessed, and checked"),
    Metric(
        "vllm:spec_decode_num_accepted_tokens", "counter", ENGINE, "tokens",
        "those of them that were right, and are among those generated",
    ),
    Metric(
        "vllm:cache_config_info", "gauge", (*ENGINE, "block_size", "num_gpu_blocks"), "1",
        "always 1; the labels are the tokens of a page and the number of pages, on CPUs too",
    ),
    Metric(
        "vllm:request_success", "counter", (*MODEL, "finished_reason"), "requests",
        "requests that ended: `stop`, `length`, `abort` (cancelled by its client or an operator), `error` (failed, or "
        "past its deadline)",
    ),
    Metric(
        "vllm:time_to_first_token_seconds", "histogram", MODEL, "seconds",
        "from the acceptance of a request to its first token",
    ),
    Metric(
        "vllm:inter_token_latency_seconds", "histogram", MODEL, "seconds",
        "between two tokens of a request, pauses of recoveries included",
    ),
    Metric(
        "vllm:request_time_per_output_token_seconds", "histogram", MODEL, "seconds",
        "of each request, the mean time between its tokens",
    ),
    Metric("vllm:e2e_request_latency_seconds", "histogram", MODEL, "seconds", "from acceptance to end"),
    Metric(
        "vllm:request_queue_time_seconds", "histogram", MODEL, "seconds", "from acceptance until a replica had a place"
    ),
    Metric("vllm:request_inference_time_seconds", "histogram", MODEL, "seconds", "from then to the end"),
    Metric("vllm:request_prefill_time_seconds", "histogram", MODEL, "seconds", "from then to the first token"),
    Metric("vllm:request_decode_time_seconds", "histogram", MODEL, "seconds", "from the first token to the last"),
    Metric("vllm:request_prompt_tokens", "histogram", MODEL, "tokens", "length of the prompts of ended requests"),
    Metric("vllm:request_generation_tokens", "histogram", MODEL, "tokens", "length of their outputs"),
    Metric("vllm:request_params_max_tokens", "histogram", MODEL, "tokens", "`max_tokens` that they asked for"),
    Metric(
        "shardray:replicas", "gauge", (*MODEL, "state"), "replicas",
        "replicas in each state: `loading`, `ready`, `recovering`, `stopping`, `failed`",
    ),
    Metric("shardray:requests_live", "gauge", MODEL, "requests", "accepted and not ended, queued ones included"),
    Metric("shardray:spares_ready", "gauge", MODEL, "hosts", "spares that wait with the runtime imported"),
    Metric("shardray:spares_wanted", "gauge", MODEL, "hosts", "`cluster.spares`"),
    Metric(
        "shardray:recoveries", "counter", ENGINE, "times", "the replica was ready again after a failure"
    ),
    Metric(
        "shardray:operations", "counter", ("operation", "outcome"), "operations",
        "`scale`, `reload`, `restart`, `drain`, of operators and of the autoscaler, that ended: `ok`, `refused`, "
        "`failed`, `cancelled`",
    ),
    Metric(
        "shardray:calls", "counter", ("method", "code"), "calls",
        "gRPC calls that ended, by status; what is refused is here: `RESOURCE_EXHAUSTED`, `INVALID_ARGUMENT`, "
        "`UNAVAILABLE` and others",
    ),
    Metric("shardray:engine_steps", "counter", ENGINE, "steps", "steps of the replica"),
    Metric("shardray:step_time_seconds", "gauge", ENGINE, "seconds", "smoothed duration of its steps"),
    Metric(
        "shardray:plan_time_seconds", "gauge", ENGINE, "seconds",
        "smoothed part of a step that plans, commits and publishes",
    ),
    Metric("shardray:kv_tokens", "gauge", ENGINE, "tokens", "that the KV cache holds"),
    Metric("shardray:kv_waste_ratio", "gauge", ENGINE, "0 to 1", "share of the pages in use that holds no token"),
    Metric(
        "shardray:expert_imbalance", "gauge", ENGINE, "ratio",
        "tokens of the busiest expert of a layer over the mean of all; absent for models without experts",
    ),
    Metric("shardray:shard_steps", "counter", SHARD, "steps", "steps that the shard took part in"),
    Metric(
        "shardray:shard_step_seconds", "counter", SHARD, "seconds",
        "time of the shard within steps: computing and waiting for other ranks; on GPUs, until the work is handed over",
    ),
    Metric(
        "shardray:shard_memory_bytes", "gauge", SHARD, "bytes",
        "memory of its device that PyTorch has reserved; on CPUs, resident memory of the process without weights that "
        "another one loaded and both share",
    ),
    Metric("shardray:shard_weight_bytes", "gauge", SHARD, "bytes", "memory of its weights"),
    Metric("shardray:shard_kv_bytes", "gauge", SHARD, "bytes", "memory of its KV pages"),
    Metric("shardray:build_info", "gauge", ("version",), "1", "always 1; the label is the version of the driver"),
    Metric("shardray:start_time_seconds", "gauge", (), "seconds", "when the driver started, since 1970"),
)  # fmt: skip


def markdown() -> str:
    """The table of docs/operations.md."""
    rows = ["| metric | type | labels | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        rows.append(f"| `{metric.exported_name}` | {metric.kind} | {labels} | {metric.unit} | {metric.meaning} |")
    return "\n".join(rows) + "\n"
