"""``shardray status --watch`` on a terminal: what is drawn of a fleet, and that it is drawn again."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading

from rich.console import Console

from shardray.runtime.cli.fleet_view import FleetView
from shardray.runtime.driver.operations import OperationKind, OperationProgress, OperationStatus
from shardray.v1 import common_pb2, control_pb2
from tests.serving import eventually, serving


def shard(stage: int, tp_rank: int, load: control_pb2.ShardLoad | None = None) -> control_pb2.Shard:
    place = {"rank": 2 * stage + tp_rank, "stage": stage, "tp_rank": tp_rank, "host": f"10.0.0.{1 + stage}"}
    return control_pb2.Shard(
        **place, pid=100 + tp_rank, device="cuda:0", first_layer=15 * stage, num_layers=15, num_heads=5, num_kv_heads=2,
        load=load,
    )  # fmt: skip


def fleet(num_prompt_tokens: int) -> control_pb2.Fleet:
    stats = common_pb2.EngineStats(
        num_pages=100, num_used_pages=43, block_size=16, num_running=3, num_waiting=1, step_time_s=0.0125,
        num_prompt_tokens=num_prompt_tokens,
    )  # fmt: skip
    load = control_pb2.ShardLoad(num_steps=10, busy_s=0.12, memory_bytes=3 << 30)
    shards = [shard(0, 0, load), shard(0, 1), shard(1, 0)]  # one is missing: nothing stands in its place
    replica = control_pb2.Replica(
        state=control_pb2.FLEET_STATE_READY, shards=shards, stats=stats, output_tokens_per_s=1234.4, num_recoveries=1
    )
    return control_pb2.Fleet(
        model_id="a-model", state=control_pb2.FLEET_STATE_READY, replicas=[replica], num_queued_requests=7,
        num_live_requests=11, num_wanted_spares=2, num_ready_spares=1,
    )  # fmt: skip


def drawn(*fleets: tuple[float, control_pb2.Fleet]) -> str:
    """The last of (time, fleet), as plain text."""
    times = iter(when for when, _ in fleets)
    view = FleetView(clock=lambda: next(times))
    console = Console(file=io.StringIO(), width=120)
    pictures = [view.draw(fleet) for _, fleet in fleets]
    console.print(pictures[-1])
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_replica_is_a_grid_of_stages_and_tensor_ranks() -> None:
    rows = [line for line in drawn((0.0, fleet(0))).splitlines() if "│" in line or "┃" in line]
    [head] = [row for row in rows if "tensor 0" in row]
    assert head.index("tensor 0") < head.index("tensor 1")
    first, second = (next(row for row in rows if f"stage {stage}" in row) for stage in (0, 1))
    assert re.search(r"stage 0 .* 10.0.0.1 pid 100 cuda:0 .* 10.0.0.1 pid 101 cuda:0", first)
    assert re.search(r"stage 1 .* 10.0.0.2 pid 100 cuda:0", second)
    assert any("layers 15–29, 5 heads, 2 kv" in row for row in rows)
    assert any("step 12.0 ms, 3 GiB" in row for row in rows)


def test_load_queue_and_recoveries_stand_beside_it() -> None:
    text = drawn((0.0, fleet(0)))
    assert "a-model ready" in text
    assert "1,234 tokens/s out · 0 prompt tokens/s · 11 in flight · 7 queued · 1 of 2 spares ready" in text
    assert re.search(r"KV ━+[ ╸╺━]+ 43% of 1,600 tokens", text)
    assert "1,234 tokens/s · 3 running · 1 waiting · step 12.5 ms" in text
    assert "1 recovery" in text


def test_the_rate_of_prompts_is_that_of_the_last_seconds() -> None:
    assert " 50 prompt tokens/s" in drawn((0.0, fleet(0)), (2.0, fleet(100)))
    assert " 10 prompt tokens/s" in drawn((0.0, fleet(0)), (20.0, fleet(100)), (25.0, fleet(150)))
    assert " 0 prompt tokens/s" in drawn((0.0, fleet(100)), (2.0, fleet(0)))  # formed again: it counts from 0


def test_a_terminal_is_drawn_again_with_every_change_until_ctrl_c() -> None:
    asyncio.run(_watch_a_change())


async def _watch_a_change() -> None:
    async with serving(None) as up:
        terminal, side = pty.openpty()
        command = [sys.executable, "-m", "shardray", "status", "--watch", "--server", up.address]
        watching = subprocess.Popen(command, stdout=side, stderr=side)
        os.close(side)
        screen = bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):  # how a terminal says that nobody writes any longer
                while data := os.read(terminal, 65536):
                    screen.extend(data)

        reader = threading.Thread(target=read)
        reader.start()
        await eventually(lambda: b"replica 0 " in screen, 30)
        up.driver.fleet.set_recovering(0, "loading weights", 0.5)
        await eventually(lambda: b"loading weights 50%" in screen, 30)
        up.driver.fleet.set_operation(OperationStatus(OperationKind.RESTART, OperationProgress("1 of 2 hosts", 0.5)))
        await eventually(lambda: re.search(rb"restart since [0-9:]+: 1 of 2 hosts 50%", screen) is not None, 30)
        watching.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(watching.wait, 20) == 130
        await asyncio.to_thread(reader.join)
        os.close(terminal)
