"""What ``shardray serve`` puts together: the driver, its gRPC server, and the replicas behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardray.runtime.cluster.events import ClusterEvent
from shardray.runtime.config import Config
from shardray.runtime.config.units import join_listen, parse_listen
from shardray.runtime.driver.autoscaler import Autoscaler
from shardray.runtime.driver.controller import FleetController
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.fleet import FleetStatus
from shardray.runtime.driver.sqlite_journal import open_journal
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.observe.observation import Observation
from shardray.runtime.server.loop import settle
from shardray.runtime.server.server import Server


@dataclass(frozen=True)
class Watcher:
    """Whom ``serve`` tells how it goes. Called in its event loop; must not block."""

    on_listening: Callable[[str], None]  # the address; health is NOT_SERVING still
    on_loading: Callable[[ClusterEvent], None]
    on_ready: Callable[[str, FleetStatus], None]  # the address, and the fleet with its shards
    on_metrics: Callable[[str], None] = lambda address: None  # the address of the metrics port, if there is one
    on_gateway: Callable[[str], None] = lambda address: None  # the address of the port for gateways, if there is one


async def serve(config: Config, model_dir: Path, watcher: Watcher, stop: asyncio.Event) -> None:
    """Serve the model in ``model_dir`` until ``stop`` is set, then let requests end and give everything back.

    The server listens while the model loads. Raises ClusterError, ListenError, MetricsListenError, MissingExtraError,
    DiscoveryFileError, JournalError or what a broken model folder raises; nothing is left behind then, nor when the
    task is cancelled.
    """
    observation = Observation(config)
    tokenizer = Tokenizer.load_optional(model_dir)
    journal = open_journal(config)
    auth = config.grpc.auth
    driver = Driver(
        config.model.source,
        tokenizer,
        config.limits,
        config.engine.max_num_seqs,
        journal,
        observation.requests,
        shares_between_callers=auth is not None and auth.share_prefixes,
    )
    driver.restore()  # before the clients of these requests can ask for them
    controller = FleetController(config, driver, watcher.on_loading)
    server = Server(config.grpc, driver, controller, observation.on_call, config.gateway)
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.push_async_callback(journal.stop)
        cleanup.push_async_callback(observation.stop)
        if (metrics_address := observation.start(driver.fleet)) is not None:
            watcher.on_metrics(metrics_address)
        settle()  # a driver that comes back has clients from here on
        port = await server.start()
        cleanup.push_async_callback(server.stop, 0.0)
        address = join_listen(parse_listen(config.grpc.listen)[0], port)
        watcher.on_listening(address)
        if config.gateway.listen is not None and server.gateway_port is not None:
            watcher.on_gateway(join_listen(parse_listen(config.gateway.listen)[0], server.gateway_port))
        cleanup.push_async_callback(controller.stop)
        if not await _unless_stopped(controller.start(model_dir), stop):
            return
        # Before the replicas stop: requests may end.
        cleanup.push_async_callback(server.stop, config.limits.shutdown_grace_s)
        scaling = asyncio.create_task(Autoscaler(config.autoscaling, driver.fleet, controller).run())
        cleanup.callback(scaling.cancel)
        settle()  # Ray has been imported since
        watcher.on_ready(address, driver.fleet.snapshot())
        await _first_of(stop.wait(), controller.stop_asked.wait())


async def _unless_stopped(starting: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Whether ``starting`` came to its end before ``stop`` was set; it is broken off otherwise."""
    task = asyncio.create_task(starting)
    try:
        await _first_of(asyncio.shield(task), stop.wait())
        if task.done():
            task.result()
            return True
        return False
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _first_of(*awaitables: Awaitable[Any]) -> None:
    """Until one of them has ended; the others are cancelled."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
