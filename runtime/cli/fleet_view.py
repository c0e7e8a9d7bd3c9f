"""The fleet on a terminal, live: each replica as a grid of stages × tensor ranks, with bars and rates."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardray.runtime.cli.fleet_words import operation_line, recovery_line, state_word
from shardray.runtime.cli.shard_table import format_bytes, layer_range
from shardray.v1 import common_pb2, control_pb2

_WINDOW_S = 10.0  # over which rates are taken
_BAR_WIDTH = 32
_STYLES = {"ready": "green", "loading": "yellow", "recovering": "yellow", "stopping": "yellow", "failed": "red"}
_FULL = 0.9  # of the KV cache: requests are about to wait for pages


class FleetView:
    """Draws one fleet after the other; rates are those between them."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._prompt_tokens: deque[tuple[float, int]] = deque()  # (time, prompt tokens so far)

    def draw(self, fleet: control_pb2.Fleet) -> RenderableType:
        """The fleet in two lines, then its replicas."""
        replicas = [self._replica(replica) for replica in fleet.replicas]
        operation = [Text(operation_line(fleet.operation), style="yellow")] if fleet.HasField("operation") else []
        return Group(self._head(fleet), self._rates(fleet), *operation, *replicas)

    def _head(self, fleet: control_pb2.Fleet) -> Text:
        state = state_word(fleet)
        head = Text.assemble((f"{fleet.model_id} ", "bold"), (state, f"bold {_STYLES.get(state, '')}"))
        return head.append(f" – {fleet.reason}") if fleet.reason else head

    def _rates(self, fleet: control_pb2.Fleet) -> Text:
        out = sum(replica.output_tokens_per_s for replica in fleet.replicas)
        parts = [
            f"{out:,.0f} tokens/s out",
            f"{self._prompt_rate(fleet):,.0f} prompt tokens/s",
            f"{fleet.num_live_requests} in flight",
            f"{fleet.num_queued_requests} queued",
        ]
        if fleet.num_ready_spares or fleet.num_wanted_spares:
            parts.append(f"{fleet.num_ready_spares} of {fleet.num_wanted_spares} spares ready")
        return Text(" · ".join(parts))

    def _prompt_rate(self, fleet: control_pb2.Fleet) -> float:
        now_s, seen = self._clock(), self._prompt_tokens
        seen.append((now_s, sum(replica.stats.num_prompt_tokens for replica in fleet.replicas)))
        while now_s - seen[0][0] > _WINDOW_S:
            seen.popleft()
        (began_s, before), (_, now) = seen[0], seen[-1]
        return max(0, now - before) / (now_s - began_s) if now_s > began_s else 0.0

    def _replica(self, replica: control_pb2.Replica) -> Panel:
        state = state_word(replica)
        style = _STYLES.get(state, "")
        lines: list[RenderableType] = []
        if replica.reason:
            lines.append(Text(f"{replica.reason} {replica.progress:.0%}", style=style))
        if replica.stats.num_pages:
            lines += [_kv_bar(replica.stats), Text(_load_line(replica))]
        if replica.shards:
            lines.append(_grid(replica))
        if line := recovery_line(replica):
            lines.append(Text(line, style="red"))
        title = Text.assemble(f"replica {replica.replica_id} ", (state, f"bold {style}"))
        return Panel(Group(*lines), title=title, title_align="left", border_style=style, expand=False)


def _kv_bar(stats: common_pb2.EngineStats) -> Table:
    share = stats.num_used_pages / stats.num_pages
    color = "red" if share > _FULL else "green"
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=1.0, completed=share, width=_BAR_WIDTH, complete_style=color, finished_style=color)
    row.add_row("KV", bar, f"{share:.0%} of {stats.num_pages * stats.block_size:,} tokens")
    return row


def _load_line(replica: control_pb2.Replica) -> str:
    from shardray.runtime.server.messages import stats_from_proto

    stats = stats_from_proto(replica.stats)
    parts = [
        f"{replica.output_tokens_per_s:,.0f} tokens/s",
        f"{stats.num_running} running",
        f"{stats.num_waiting} waiting",
        f"step {1000 * stats.step_time_s:.1f} ms",
    ]
    if stats.num_prefix_hits:
        parts.append(f"{stats.prefix_hit_rate:.0%} of prompts found computed")
    if stats.num_drafted_tokens:
        parts.append(f"{stats.acceptance_rate:.0%} of drafted tokens right")
    if stats.expert_imbalance:
        parts.append(f"busiest expert {stats.expert_imbalance:.1f}x the mean")
    return " · ".join(parts)


def _grid(replica: control_pb2.Replica) -> Table:
    """Stages downwards, tensor ranks to the right."""
    table = Table(padding=(0, 1), show_lines=True, header_style="dim")
    num_ranks = 1 + max(shard.tp_rank for shard in replica.shards)
    cells = {(shard.stage, shard.tp_rank): _cell(shard) for shard in replica.shards}
    table.add_column("")
    for rank in range(num_ranks):
        table.add_column(f"tensor {rank}", no_wrap=True)
    for stage in range(1 + max(shard.stage for shard in replica.shards)):
        table.add_row(f"stage {stage}", *(cells.get((stage, rank), "") for rank in range(num_ranks)))
    return table


def _cell(shard: control_pb2.Shard) -> str:
    lines = [
        f"{shard.host} pid {shard.pid} {shard.device}",
        f"layers {layer_range(shard)}, {shard.num_heads} heads, {shard.num_kv_heads} kv",
    ]
    if shard.HasField("load"):
        load = shard.load
        step = f"step {1000 * load.busy_s / load.num_steps:.1f} ms, " if load.num_steps else ""
        lines.append(f"{step}{format_bytes(load.memory_bytes)}")
    return "\n".join(lines)
