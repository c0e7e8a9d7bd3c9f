"""The port for gateways: what is served there, and when it is told of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import grpc.aio
from smg_grpc_proto import vllm_engine_pb2_grpc

from shardray.runtime.config import GatewaySettings
from shardray.runtime.config.units import join_listen, parse_listen
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.fleet import FleetState
from shardray.runtime.server.gateway.discovery import DiscoveryFile, DiscoveryFileError
from shardray.runtime.server.gateway.service import VllmEngineService
from shardray.runtime.server.inference import InferenceService

_log = logging.getLogger(__name__)


class GatewayPort:
    """Raises DiscoveryFileError."""

    def __init__(
        self, settings: GatewaySettings, driver: Driver, inference: InferenceService, server: grpc.aio.Server
    ) -> None:
        self._settings = settings
        self._driver = driver
        self._server = server
        self._file = DiscoveryFile(Path(settings.discovery_file)) if settings.discovery_file else None
        self._announcing: asyncio.Task[None] | None = None
        if self._file is not None:
            self._file.check()
        service = VllmEngineService(driver, inference, settings.model_name)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(service, server)

    async def start(self, port: int, is_encrypted: bool) -> None:
        """Serve at ``port``, where the server listens."""
        await self._server.start()
        if self._file is not None:
            host = self._settings.advertise_host or parse_listen(self._settings.listen or "")[0]
            url = f"{'grpcs' if is_encrypted else 'grpc'}://{join_listen(host, port)}"
            self._announcing = asyncio.create_task(self._announce(self._file, url))

    async def withdraw(self) -> None:
        """Send new requests elsewhere; those under way go on."""
        if self._announcing is not None:
            self._announcing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._announcing

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    async def _announce(self, file: DiscoveryFile, url: str) -> None:
        """From when the fleet takes requests first until it stops. In between it stays entered, also when it has no
        replica: a gateway that knows no worker of a model says that there is no such model."""
        entering: asyncio.Future[None] | None = None
        try:
            async for status in self._driver.fleet.watch():
                if status.takes_requests and entering is None:
                    entering = asyncio.ensure_future(asyncio.to_thread(file.enter, url))
                    await asyncio.shield(entering)
                elif status.state is FleetState.STOPPING:
                    break
        except DiscoveryFileError as error:
            _log.error("%s; gateways do not hear of this server", error)
        finally:
            if entering is not None:
                await asyncio.wait([entering])
                with contextlib.suppress(DiscoveryFileError):
                    await asyncio.to_thread(file.leave)
