"""All that watches a fleet from outside, as the settings ask for it: metrics and their port, request logs, traces."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from shardray.runtime.config import Config
from shardray.runtime.driver.fleet import Fleet
from shardray.runtime.driver.observer import RequestObserver
from shardray.runtime.observe.extras import check_extras
from shardray.runtime.observe.request_log import RequestLog
from shardray.runtime.observe.request_metrics import RequestMetrics

if TYPE_CHECKING:
    from shardray.runtime.observe.port import MetricsPort
    from shardray.runtime.observe.tracer import Tracer


class Observation:
    """``requests`` is for the driver, ``on_call`` for the server; ``start`` it with the driver's fleet, in its loop."""

    def __init__(self, config: Config) -> None:
        """Raises MissingExtraError."""
        check_extras(config)
        self._listen = config.metrics.listen
        self.calls: Counter[tuple[str, str]] = Counter()
        self._port: MetricsPort | None = None
        self._tracer: Tracer | None = None
        others: RequestObserver = RequestLog()
        if config.tracing.endpoint is not None:
            from shardray.runtime.observe.tracer import Tracer

            others = self._tracer = Tracer(config.tracing, config.model.source, then=others)
        self._metrics = RequestMetrics(then=others)
        # Without a port nobody would read what takes half a microsecond of each token to measure.
        self.requests: RequestObserver = others if self._listen is None else self._metrics

    def on_call(self, method: str, code: str) -> None:
        """A call of our gRPC services has ended."""
        self.calls[method, code] += 1

    def start(self, fleet: Fleet) -> str | None:
        """Answer at the metrics port from now on; its address, None if there is none. Raises MetricsListenError."""
        if self._listen is None:
            return None
        from shardray.runtime.observe.port import MetricsPort

        self._port = MetricsPort(self._listen, fleet, self._metrics, self.calls)
        return self._port.address

    async def stop(self) -> None:
        """Close the port, and send the spans that are pending. Idempotent."""
        if self._port is not None:
            port, self._port = self._port, None
            await port.stop()
        if self._tracer is not None:
            tracer, self._tracer = self._tracer, None
            await tracer.stop()
