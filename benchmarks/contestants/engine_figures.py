"""What shardray's contestants have in common: sizes, and which figures of the engine go into a result."""

from __future__ import annotations

from shardray.runtime.engine.request import EngineStats

KV_MEMORY_BYTES = 1536 << 20  # holds every workload of smollm2-135m at once; other engines get as much as they ask for


def figures(stats: EngineStats) -> dict[str, float]:
    """Empty while the engine is idle: there is nothing to waste then."""
    if not stats.num_running:
        return {}
    return {
        "kv_waste": stats.kv_waste,
        "control_s_per_step": stats.plan_time_s,
        "step_s": stats.step_time_s,
        "num_running": stats.num_running,
        "num_preemptions": stats.num_preemptions,
    }
