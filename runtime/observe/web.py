"""The metrics port's HTTP server: a few paths to read, and nothing to change.

That of the standard library, as in ``prometheus_client``, in threads of its own. It is for a private network.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from shardray.runtime.config.units import is_loopback_host, join_listen, parse_listen

Route = Callable[
    [str], tuple[str, bytes]
]  # the request's Accept header -> (content type, body); may raise TimeoutError

_log = logging.getLogger(__name__)
_MAX_CONNECTIONS = 64
_IDLE_S = 10.0  # of a connection that sends no request, or takes no answer
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class MetricsListenError(OSError):
    """The address cannot be listened on; one line with the fix."""


class WebServer:
    """Answers GET for each path of ``routes``, from ``start`` to ``stop``."""

    def __init__(self, listen: str, routes: Mapping[str, Route]) -> None:
        """Raises MetricsListenError."""
        host, port = parse_listen(listen)
        try:
            self._server = _Server(host, port, routes)
        except OSError as error:
            reason = f"{error.strerror or error}; choose another address, or null to listen nowhere"
            raise MetricsListenError(f"metrics.listen: cannot listen on {listen}: {reason}") from None
        self.address = join_listen(host, self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Close the port; blocks for a tenth of a second. Answers under way are not waited for."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.routes = routes
        self.is_loopback = is_loopback_host(host)
        self._room = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without a question to the name service, which may take its time."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is not worth a line."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("an answer at metrics.listen failed")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _IDLE_S
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        route = self.server.routes.get(self.path.partition("?")[0])
        # A page of a stranger whose name resolves to this machine must not read what the loopback interface shows.
        if self.server.is_loopback and not is_loopback_host(self._host()):
            return self._fail(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1 or localhost")
        if route is None:
            return self._fail(HTTPStatus.NOT_FOUND, f"there are {', '.join(self.server.routes)}")
        try:
            content_type, body = route(self.headers.get("Accept", ""))
        except TimeoutError:
            return self._fail(HTTPStatus.SERVICE_UNAVAILABLE, "the driver does not answer")
        return self._send(HTTPStatus.OK, content_type, body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: other methods, requests that are none."""
        self.close_connection = True
        self._fail(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{message}\n".encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": content_type, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _host(self) -> str:
        name = self.headers.get("Host", "")
        return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]

    def version_string(self) -> str:
        return "shardray"

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes come every few seconds: no lines."""
