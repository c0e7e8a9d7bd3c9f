"""Settings of what is seen of a fleet: metrics, logs, traces."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from shardray.runtime.config.units import STRICT_KEYS, Listen, Share, Text


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class MetricsSettings:
    """What can be seen from outside."""

    listen: Listen | None = None
    """Address of the port for Prometheus and the web page, e.g. 127.0.0.1:9464; null: none. Needs shardray[metrics]."""


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class LoggingSettings:
    """What the driver writes to stderr."""

    format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""
    level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least level that is written; info has a line for each request that has ended."""


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class TracingSettings:
    """Where OpenTelemetry spans of requests go."""

    endpoint: Text | None = None
    """A collector that takes OTLP over gRPC, e.g. http://127.0.0.1:4317; null: none. Needs shardray[tracing]."""
    sample_ratio: Share = 1.0
    """Share of the requests that are traced; those that come with a trace context follow that."""
