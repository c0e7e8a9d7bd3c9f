"""What ``shardray serve`` puts together: the driver, its gRPC server, and the replicas behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardray.runtime.cluster.events import ClusterEvent, PlacementWaiting, ShardProgress
from shardray.runtime.cluster.replica import Replica, ReplicaSet
from shardray.runtime.config import Config
from shardray.runtime.config.units import join_listen, parse_listen
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.fleet import Fleet, FleetStatus
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.server import Server


@dataclass(frozen=True)
class Watcher:
    """Whom ``serve`` tells how it goes. Called in its event loop; must not block."""

    on_listening: Callable[[str], None]  # the address; health is NOT_SERVING still
    on_loading: Callable[[ClusterEvent], None]
    on_ready: Callable[[str, FleetStatus], None]  # the address, and the fleet with its shards


async def serve(config: Config, model_dir: Path, watcher: Watcher, stop: asyncio.Event) -> None:
    """Serve the model in ``model_dir`` until ``stop`` is set, then let requests end and give everything back.

    The server listens while the model loads. Raises ClusterError, ListenError or what a broken model folder raises;
    nothing is left behind then, nor when the task is cancelled.
    """
    driver = Driver(config.model.source, Tokenizer.load_optional(model_dir), config.limits, config.engine.max_num_seqs)
    server = Server(config.grpc, driver)
    async with contextlib.AsyncExitStack() as cleanup:
        port = await server.start()
        cleanup.push_async_callback(server.stop, 0.0)
        address = join_listen(parse_listen(config.grpc.listen)[0], port)
        watcher.on_listening(address)
        replicas = await _form_unless_stopped(config, model_dir, driver.fleet, watcher, stop)
        if replicas is None:
            return
        cleanup.push_async_callback(replicas.stop)
        cleanup.push_async_callback(
            server.stop, config.limits.shutdown_grace_s
        )  # before the replicas: requests may end
        await asyncio.gather(*(_attach(driver, replica) for replica in replicas.replicas))
        watches = [asyncio.create_task(_detach_when_failed(driver, replica)) for replica in replicas.replicas]
        cleanup.callback(lambda: [watch.cancel() for watch in watches])
        watcher.on_ready(address, driver.fleet.snapshot())
        await stop.wait()


async def _form_unless_stopped(
    config: Config, model_dir: Path, fleet: Fleet, watcher: Watcher, stop: asyncio.Event
) -> ReplicaSet | None:
    """The running replicas, or None if ``stop`` came first."""

    def on_event(event: ClusterEvent) -> None:
        _show_loading(fleet, event)
        watcher.on_loading(event)

    forming = asyncio.create_task(ReplicaSet.start(config, model_dir, on_event))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({forming, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return forming.result() if forming.done() else None
    finally:
        stopped.cancel()
        if not forming.done():
            forming.cancel()
            await asyncio.gather(forming, return_exceptions=True)


def _show_loading(fleet: Fleet, event: ClusterEvent) -> None:
    if isinstance(event, PlacementWaiting):
        fleet.set_loading(event.replica_id, f"{event.reason} (waiting {event.remaining_s:.0f} s more)")
    elif isinstance(event, ShardProgress):
        doing = f"rank {event.rank} on {event.host}: {event.doing}"
        fleet.set_loading(event.replica_id, doing, event.fraction)


async def _attach(driver: Driver, replica: Replica) -> None:
    await driver.attach(replica.replica_id, replica.address, replica.secret, replica.shards)


async def _detach_when_failed(driver: Driver, replica: Replica) -> None:
    """Fail the requests of a replica that is no more; the fleet and health tell of it from then on."""
    reason = await asyncio.shield(replica.failed)
    await driver.detach(replica.replica_id, reason)
