"""Which process holds what: the shards of a fleet as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table


class ShardRow(Protocol):
    """A shard as the cluster reports it, or as it comes over gRPC."""

    @property
    def rank(self) -> int: ...
    @property
    def stage(self) -> int: ...
    @property
    def tp_rank(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def first_layer(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def num_kv_tokens(self) -> int: ...


_COLUMNS = (
    "replica",
    "stage",
    "tensor",
    "host",
    "pid",
    "device",
    "layers",
    "heads",
    "kv heads",
    "weights",
    "kv",
    "tokens",
)
_TEXT_COLUMNS = ("host", "device")
_MIN_WIDTH = 120


def shard_table(replicas: Iterable[tuple[int, Sequence[ShardRow]]]) -> Table:
    """One row for each shard of each (replica id, shards)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right", no_wrap=True)
    for replica_id, shards in replicas:
        for shard in shards:
            table.add_row(str(replica_id), *_cells(shard))
    return table


def table_console() -> Console:
    """A console on stdout that never cuts a cell: a pipe has no width, and a narrow terminal folds by itself."""
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, _MIN_WIDTH)
    return console


def _cells(shard: ShardRow) -> tuple[str, ...]:
    return (
        str(shard.stage),
        str(shard.tp_rank),
        shard.host,
        str(shard.pid),
        shard.device,
        layer_range(shard),
        str(shard.num_heads),
        str(shard.num_kv_heads),
        format_bytes(shard.weight_bytes),
        format_bytes(shard.kv_bytes),
        f"{shard.num_kv_tokens:,}",
    )


def layer_range(shard: ShardRow) -> str:
    """``0–14``, or ``none``."""
    return f"{shard.first_layer}–{shard.first_layer + shard.num_layers - 1}" if shard.num_layers else "none"


def format_bytes(num_bytes: float) -> str:
    """Three significant figures: 1536 → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
