"""The metrics port: what Prometheus scrapes, the fleet as JSON, and a page that shows it.

For each answer the driver's loop copies how things are, in some microseconds; the thread that answers does the rest.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import Counter
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from shardray import __version__
from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.observe.collector import FleetCollector, Observed
from shardray.runtime.observe.histogram import Histogram
from shardray.runtime.observe.request_metrics import RequestMetrics
from shardray.runtime.observe.web import Route, WebServer

T = TypeVar("T")
_ANSWER_S = 5.0  # for the driver's loop to say how things are
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_FILES = resources.files("shardray.runtime.observe") / "page"


class MetricsPort:
    """Answers from when it is made until ``stop``. Make it in the driver's loop. Raises MetricsListenError."""

    def __init__(self, listen: str, fleet: Fleet, requests: RequestMetrics, calls: Counter[tuple[str, str]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fleet, self._requests, self._calls = fleet, requests, calls
        self._registry = CollectorRegistry()
        self._registry.register(FleetCollector(lambda: self._in_loop(self._observed)))
        ProcessCollector(registry=self._registry)
        pages = {path: _page(name, kind) for path, (name, kind) in _PAGE.items()}
        self._web = WebServer(listen, {**pages, "/fleet.json": self._fleet_json, "/metrics": self._metrics})
        self.address = self._web.address
        self._web.start()

    async def stop(self) -> None:
        """Close the port."""
        await asyncio.to_thread(self._web.stop)

    def _metrics(self, accept: str) -> tuple[str, bytes]:
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)

    def _fleet_json(self, accept: str) -> tuple[str, bytes]:
        return "application/json", msgspec.json.encode(self._in_loop(self._overview))

    def _in_loop(self, make: Callable[[], T]) -> T:
        """Raises TimeoutError if the loop hangs or has ended."""
        made: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                made.set_result(make())
            except Exception as error:
                made.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:
            raise TimeoutError("the driver's loop has ended") from None
        return made.result(_ANSWER_S)

    def _observed(self) -> Observed:
        requests = self._requests
        histograms = {name: histogram.copy() for name, histogram in requests.histograms.items()}
        return Observed(self._fleet.snapshot(), requests.ends.copy(), self._calls.copy(), histograms)

    def _overview(self) -> dict[str, Any]:
        """What the page shows; counts run on from the driver's start, so that a reader can take their differences."""
        requests = self._requests
        return {
            "version": __version__,
            "time_s": time.time(),
            "fleet": self._fleet.snapshot(),
            "ends": dict(requests.ends),
            "first_token_s": _counts(requests.first_token_s),
            "inter_token_s": _counts(requests.inter_token_s),
        }


def _counts(histogram: Histogram) -> dict[str, list[float]]:
    return {"bounds": list(histogram.bounds), "counts": list(histogram.counts)}


def _page(name: str, content_type: str) -> Route:
    body = (_FILES / name).read_bytes()
    return lambda accept: (f"{content_type}; charset=utf-8", body)
