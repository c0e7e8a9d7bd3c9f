"""What a scrape reads: the fleet and its requests as families of samples, by the catalog."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from shardray import __version__
from shardray.runtime.driver.fleet import FleetState, FleetStatus, ReplicaStatus
from shardray.runtime.observe.catalog import METRICS
from shardray.runtime.observe.histogram import Histogram

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


@dataclasses.dataclass(frozen=True)
class Observed:
    """All that is known at one moment."""

    fleet: FleetStatus
    ends: Counter[str]  # of requests, by reason
    calls: Counter[tuple[str, str]]  # that ended, by method and code
    histograms: dict[str, Histogram]  # by the name of the metric


class FleetCollector(Collector):
    """``observe`` is called once for each scrape, in the thread that scrapes."""

    def __init__(self, observe: Callable[[], Observed]) -> None:
        self._observe = observe

    def collect(self) -> Iterator[Family]:
        yield from families(self._observe())


def families(observed: Observed) -> list[Family]:
    """Every metric of the catalog; those of replicas and shards have a sample for each that there is."""
    samples = _Samples()
    _add_requests(samples, observed)
    _add_fleet(samples, observed.fleet)
    for replica in observed.fleet.replicas:
        _add_engine(samples, observed.fleet.model_id, replica)
        _add_shards(samples, observed.fleet.model_id, replica)
    return list(samples.families.values())


class _Samples:
    """The families of a scrape while it is filled."""

    def __init__(self) -> None:
        self.families: dict[str, Any] = {
            metric.name: _FAMILIES[metric.kind](metric.name, metric.meaning, labels=metric.labels) for metric in METRICS
        }

    def add(self, name: str, value: float, *labels: object) -> None:
        self.families[name].add_metric([str(label) for label in labels], value)

    def add_histogram(self, name: str, histogram: Histogram, *labels: str) -> None:
        self.families[name].add_metric(labels, histogram.cumulative(), histogram.total)


def _add_requests(samples: _Samples, observed: Observed) -> None:
    model = observed.fleet.model_id
    for name, histogram in observed.histograms.items():
        samples.add_histogram(name, histogram, model)
    for reason, count in observed.ends.items():
        samples.add("vllm:request_success", count, model, reason)
    for call, count in observed.calls.items():
        samples.add("shardray:calls", count, *call)


def _add_fleet(samples: _Samples, fleet: FleetStatus) -> None:
    model = fleet.model_id
    states = Counter(replica.state for replica in fleet.replicas)
    for state in FleetState:
        samples.add("shardray:replicas", states[state], model, state)
    samples.add("vllm:num_requests_waiting", fleet.num_queued_requests, model, "driver")
    samples.add("shardray:requests_live", fleet.num_live_requests, model)
    samples.add("shardray:spares_ready", fleet.num_ready_spares, model)
    samples.add("shardray:spares_wanted", fleet.num_wanted_spares, model)
    for operation, outcome, count in fleet.ended_operations:
        samples.add("shardray:operations", count, operation, outcome)
    samples.add("shardray:start_time_seconds", fleet.start_time_s)
    samples.add("shardray:build_info", 1, __version__)


def _add_engine(samples: _Samples, model: str, replica: ReplicaStatus) -> None:
    stats, engine = replica.stats, (model, replica.replica_id)
    num_pages = stats.num_pages
    samples.add("vllm:num_requests_running", stats.num_running, *engine)
    samples.add("vllm:num_requests_waiting", stats.num_waiting, *engine)
    samples.add("vllm:kv_cache_usage_perc", stats.num_used_pages / num_pages if num_pages else 0.0, *engine)
    samples.add("vllm:num_preemptions", stats.num_preemptions, *engine)
    samples.add("vllm:prompt_tokens", stats.num_prompt_tokens, *engine)
    samples.add("vllm:prefix_cache_queries", stats.num_prefix_queries, *engine)
    samples.add("vllm:prefix_cache_hits", stats.num_prefix_hits, *engine)
    samples.add("vllm:generation_tokens", stats.num_output_tokens, *engine)
    samples.add("vllm:spec_decode_num_draft_tokens", stats.num_drafted_tokens, *engine)
    samples.add("vllm:spec_decode_num_accepted_tokens", stats.num_accepted_tokens, *engine)
    samples.add("vllm:cache_config_info", 1, *engine, stats.block_size, num_pages)
    samples.add("shardray:recoveries", replica.num_recoveries, *engine)
    samples.add("shardray:engine_steps", stats.num_steps, *engine)
    samples.add("shardray:step_time_seconds", stats.step_time_s, *engine)
    samples.add("shardray:plan_time_seconds", stats.plan_time_s, *engine)
    samples.add("shardray:kv_tokens", num_pages * stats.block_size, *engine)
    samples.add("shardray:kv_waste_ratio", stats.kv_waste, *engine)
    if stats.expert_imbalance:
        samples.add("shardray:expert_imbalance", stats.expert_imbalance, *engine)


def _add_shards(samples: _Samples, model: str, replica: ReplicaStatus) -> None:
    for shard in replica.shards:
        labels = (model, replica.replica_id, shard.stage, shard.tp_rank, shard.host, shard.device)
        samples.add("shardray:shard_weight_bytes", shard.weight_bytes, *labels)
        samples.add("shardray:shard_kv_bytes", shard.kv_bytes, *labels)
        if (load := replica.load_of(shard)) is not None:
            samples.add("shardray:shard_steps", load.num_steps, *labels)
            samples.add("shardray:shard_step_seconds", load.busy_s, *labels)
            samples.add("shardray:shard_memory_bytes", load.memory_bytes, *labels)
