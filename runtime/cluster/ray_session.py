"""One connection to Ray: started on this machine (``local``), joined (``auto``) or remote (``ray://host:port``).

A local Ray belongs to the session and ends with it. When the driver is killed, its hosts and servers end at once; two
idle agents of Ray's follow within about a minute, after they gave up reporting to the servers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported: it reads the environment once

import ray

from shardray.runtime.cluster.errors import ClusterError
from shardray.runtime.config import RaySettings

_log = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 5.0
_ROOM_FOR_HOSTS = 4  # times the hosts asked for: a local Ray's CPUs are places, and healing or scaling needs some
_OBJECT_STORE_BYTES = 80 << 20  # near Ray's minimum: no tensor goes through it
_LOCAL_SYSTEM_CONFIG = {
    "worker_niceness": 0,  # the hosts are the work; Ray would put them behind everything else on the machine
    "kill_worker_timeout_milliseconds": 300,  # a stopped process cannot end itself: SIGKILL follows after this
    # A Ray without a dashboard has nobody to show these to; they take a sixth of what its processes use when idle.
    "enable_metrics_collection": False,
    "task_events_report_interval_ms": 0,
    "num_workers_soft_limit": 0,  # no worker waits for tasks: there are none, and one takes a percent of a core
    "memory_monitor_refresh_ms": 2000,
}


class RaySession:
    """Opens the connection in its constructor; ``stop`` closes it. Both block. Raises ClusterError."""

    def __init__(self, settings: RaySettings, num_hosts: int) -> None:
        self.settings = settings
        self.is_local = settings.address == "local"
        self.joined = ray.is_initialized()  # by someone else in this process, who will also end it
        self._closing = threading.Event()
        if not self.joined:
            opened: Future[None] = Future()
            # Ray's processes end with the thread that started them: this one lives as long as the session. A daemon,
            # so that a program which ends without ``stop`` gets to Ray's own clean-up before the thread is gone.
            threading.Thread(target=self._hold, args=(num_hosts, opened), name="ray-session", daemon=True).start()
            opened.result()

    def stop(self) -> None:
        """Close the connection; a local Ray ends, with every process of it. Idempotent."""
        if not self.joined and not self._closing.is_set():
            ray.shutdown()
            self._closing.set()

    def _hold(self, num_hosts: int, opened: Future[None]) -> None:
        try:
            self._open(num_hosts)
        except BaseException as error:  # raised again where the session is made
            ray.shutdown()
            opened.set_exception(error)
        else:
            opened.set_result(None)
            self._closing.wait()

    def _open(self, num_hosts: int) -> None:
        _quiet_ray()
        if self.settings.address.startswith("ray://"):
            _check_reachable(self.settings.address)
        try:
            with _no_cluster() if self.is_local else contextlib.nullcontext():
                ray.init(
                    address=self.settings.address,
                    namespace=self.settings.namespace,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **(self._local_options(num_hosts) if self.is_local else {}),
                )
        except Exception as error:  # a raylet that did not come up in time is nothing more particular
            raise ClusterError(self._explain(error)) from error
        if self.is_local:
            _end_idle_agents()

    def _local_options(self, num_hosts: int) -> dict[str, Any]:
        num_cpus = math.ceil(num_hosts * self.settings.cpus_per_host) * _ROOM_FOR_HOSTS
        return {
            "num_cpus": max(os.cpu_count() or 1, num_cpus),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_system_config": _LOCAL_SYSTEM_CONFIG,
        }

    def _explain(self, error: Exception) -> str:
        address = self.settings.address
        cause = " ".join(str(error).split())
        if address == "local":
            return f"ray.address: local: Ray did not start on this machine: {cause}"
        if "Could not find any running Ray" in cause:
            return "ray.address: auto: no running Ray found; start one (ray start --head), or use ray.address: local"
        hint = "a cluster with token authentication needs RAY_AUTH_MODE=token in this environment"
        return f"ray.address: {address}: no connection to that cluster: {cause} ({hint})"


@contextlib.contextmanager
def _no_cluster() -> Iterator[None]:
    """A Ray that other machines could join listens on all addresses; one that cannot be joined listens on 127.0.0.1.

    That is a constant of Ray's, for systems whose firewalls ask their users. In versions without it the token is what
    keeps strangers out.
    """
    constants = ray._private.ray_constants
    joinable = getattr(constants, "ENABLE_RAY_CLUSTER", True)
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = joinable


def _check_reachable(address: str) -> None:
    """Ray itself would try for half a minute."""
    url = urlsplit(address)
    try:
        socket.create_connection((url.hostname or "", url.port or 10001), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        hint = f"nothing answers there ({error.strerror or error}); is a Ray head running?"
        raise ClusterError(f"ray.address: {address}: {hint}") from error


def _end_idle_agents() -> None:
    """End what a local Ray has for logs, dashboard and autoscaler, and nobody uses: together a percent of a core."""
    node = ray._private.worker._global_node
    for agent in ("log_monitor", "dashboard", "monitor"):
        if hasattr(node, f"kill_{agent}"):  # in other versions of Ray: then it goes on
            getattr(node, f"kill_{agent}")(check_alive=False)


def _quiet_ray() -> None:
    """Keep Ray's paragraph about every lost worker off the driver's stdout; the fleet reports it in one line."""
    worker = ray._private.worker
    if hasattr(worker, "print_to_stdstream"):  # in other versions of Ray: then it stays as loud as it is
        worker.print_to_stdstream = _log_lines


def _log_lines(data: dict[str, Any], ignore_prefix: bool = False) -> None:
    _log.debug("%s", data.get("lines"))
