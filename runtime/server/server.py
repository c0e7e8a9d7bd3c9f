"""The public gRPC server: the services, health, reflection, and an end that loses as little as possible."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardray.runtime.config import GatewaySettings, GrpcSettings
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.operations import FleetOperator
from shardray.runtime.server.auth import AuthInterceptor
from shardray.runtime.server.calls import CallCounter, OnCall
from shardray.runtime.server.control import ControlService
from shardray.runtime.server.inference import InferenceService
from shardray.runtime.server.interceptors import StatusInterceptor
from shardray.runtime.server.listen import ListenError, check_listen, raise_file_limit
from shardray.runtime.server.secret_files import SecretFiles, keep_fresh
from shardray.runtime.server.tls import ServerTls
from shardray.runtime.server.tokens import TokenFile
from shardray.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from shardray.runtime.server.gateway.port import GatewayPort

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_CONTROL = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
# Long enough for the last message of every stream to leave.
_FLUSH_S = 1.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """Serves one driver. It is up before the model is: health says NOT_SERVING, Generate UNAVAILABLE.

    ``operator`` does what Scale, Reload, Restart and Drain ask for; without one they are UNIMPLEMENTED. ``on_call``
    hears of every call that has ended.
    """

    def __init__(
        self,
        settings: GrpcSettings,
        driver: Driver,
        operator: FleetOperator | None = None,
        on_call: OnCall = lambda method, code: None,
        gateway: GatewaySettings | None = None,
    ) -> None:
        self._settings = settings
        self._gateway_settings = gateway or GatewaySettings()
        self._driver = driver
        self._operator = operator
        self._on_call = on_call
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        self._stop_task: asyncio.Task[None] | None = None
        self._secrets_task: asyncio.Task[None] | None = None
        self._tls = ServerTls(settings.tls) if settings.tls else None
        self._tokens = TokenFile(settings.auth) if settings.auth else None
        # One for each port: gRPC takes a renewed certificate away from whoever asks for it first.
        own_tls = None if self._gateway_settings.lets_everyone_in else settings.tls
        self._gateway_tls = ServerTls(own_tls) if own_tls else None
        self._gateway: GatewayPort | None = None
        self.gateway_port: int | None = None  # once started, with gateway.listen
        self._inference_names = [_INFERENCE]
        self._probe_server: grpc.aio.Server | None = None
        self.probe_port: int | None = None  # once started, with grpc.probe_listen

    async def start(self) -> int:
        """Listen and serve; returns the port. Raises ListenError, SecretsError, DiscoveryFileError."""
        secrets: list[SecretFiles] = [
            files for files in (self._tls, self._gateway_tls, self._tokens) if files is not None
        ]
        for files in secrets:
            files.start()
        check_listen("grpc.listen", self._settings.listen)
        raise_file_limit()
        self._server = grpc.aio.server(interceptors=self._interceptors(self._tokens), options=self._options())
        inference = InferenceService(self._driver, self._settings)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        if self._settings.kserve:
            from shardray.runtime.server.kserve.service import SERVICE, add_to

            add_to(self._server, self._driver, inference)
            self._inference_names.append(SERVICE)
        control = ControlService(self._driver.fleet, self._operator)
        control_pb2_grpc.add_ControlServiceServicer_to_server(control, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._settings.reflects:
            names = (*self._inference_names, _CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        port = self._listen(self._server, "grpc.listen", self._settings.listen, self._tls)
        if self._settings.probe_listen is not None:
            await self._start_probe(self._settings.probe_listen)
        if self._gateway_settings.listen is not None:
            await self._start_gateway(self._gateway_settings.listen, inference)
        await self._health.set("", _NOT_SERVING)
        for name in self._inference_names:
            await self._health.set(name, _NOT_SERVING)
        await self._health.set(_CONTROL, _SERVING)
        await self._server.start()
        self._health_task = asyncio.create_task(self._follow_fleet())
        if secrets:
            self._secrets_task = asyncio.create_task(keep_fresh(secrets))
        return port

    async def stop(self, grace_s: float) -> None:
        """Health NOT_SERVING, refuse new requests, give streams ``grace_s``, fail the rest, close. Idempotent."""
        if self._stop_task is None:
            self._stop_task = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stop_task)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()

    async def _stop(self, grace_s: float) -> None:
        for task in (self._health_task, self._secrets_task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._health.enter_graceful_shutdown()
        if self._gateway is not None:
            await self._gateway.withdraw()
        await self._driver.shutdown(grace_s)
        servers = [server for server in (self._server, self._probe_server, self._gateway) if server is not None]
        await asyncio.gather(*(server.stop(_FLUSH_S) for server in servers))

    async def _start_probe(self, listen: str) -> None:
        check_listen("grpc.probe_listen", listen)
        self._probe_server = grpc.aio.server(options=self._options())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probe_server)
        self.probe_port = self._listen(self._probe_server, "grpc.probe_listen", listen, None)
        await self._probe_server.start()

    async def _start_gateway(self, listen: str, inference: InferenceService) -> None:
        from shardray.runtime.server.gateway.port import GatewayPort  # needs packages that the core is without

        check_listen("gateway.listen", listen)
        tokens = None if self._gateway_settings.lets_everyone_in else self._tokens
        server = grpc.aio.server(interceptors=self._interceptors(tokens), options=self._options())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._gateway = GatewayPort(self._gateway_settings, self._driver, inference, server)
        self.gateway_port = self._listen(server, "gateway.listen", listen, self._gateway_tls)
        await self._gateway.start(self.gateway_port, is_encrypted=self._gateway_tls is not None)

    def _interceptors(self, tokens: TokenFile | None) -> list[grpc.aio.ServerInterceptor]:
        # A client that stalls may do so for as long as a request that does not.
        status = StatusInterceptor(self._driver.limits.default_deadline_s)
        authentication = [] if tokens is None else [AuthInterceptor(tokens)]
        return [CallCounter(self._on_call), *authentication, status]  # the first sees what the second refuses

    @staticmethod
    def _listen(server: grpc.aio.Server, key: str, address: str, tls: ServerTls | None) -> int:
        try:
            if tls is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, tls.credentials())
        except RuntimeError as error:
            raise ListenError(key, address, f"{error}; choose another address") from None

    async def _follow_fleet(self) -> None:
        async for status in self._driver.fleet.watch():
            serving = _SERVING if status.takes_requests else _NOT_SERVING
            await self._health.set("", serving)
            for name in self._inference_names:
                await self._health.set(name, serving)

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 0),  # or two servers would share the port without a word
            ("grpc.max_receive_message_length", self._settings.max_message_bytes),
            # A call that its client opens and does not read keeps what gRPC has buffered for it.
            ("grpc.max_concurrent_streams", 1024),
            # A connection that says nothing of HTTP/2.
            ("grpc.server_handshake_timeout_ms", 20_000),
            # Clients that ping every 30 s are welcome, also between calls.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # A client that vanished without a word is found and its request freed.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
