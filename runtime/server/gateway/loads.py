"""How busy the fleet is, in a gateway's words: one engine, whatever its replicas and shards."""

from __future__ import annotations

from datetime import UTC, datetime

from smg_grpc_proto import vllm_engine_pb2

from shardray.runtime.driver.fleet import FleetStatus


def loads_of(status: FleetStatus) -> vllm_engine_pb2.GetLoadsResponse:
    stats = [replica.stats for replica in status.replicas]
    num_running = sum(one.num_running for one in stats)
    num_waiting = status.num_queued_requests + sum(one.num_waiting for one in stats)
    num_pages, num_used_pages = sum(one.num_pages for one in stats), sum(one.num_used_pages for one in stats)
    load = vllm_engine_pb2.SchedulerLoad(
        num_running_reqs=num_running,
        num_waiting_reqs=num_waiting,
        num_total_reqs=num_running + num_waiting,
        num_used_tokens=sum(one.num_cached_tokens for one in stats),
        max_total_num_tokens=sum(one.num_pages * one.block_size for one in stats),
        token_usage=num_used_pages / num_pages if num_pages else 0.0,
        gen_throughput=sum(replica.output_tokens_per_s for replica in status.replicas),
    )
    now = datetime.now(UTC).isoformat()
    return vllm_engine_pb2.GetLoadsResponse(timestamp=now, dp_rank_count=1, loads=[load])
