"""Logs of the driver's process: lines for people, or one JSON object a line for a log store.

A record that is made while a request is handled carries its id. Prompts, tokens and texts are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from shardray.runtime.config import LoggingSettings

FIELDS = "fields"  # the attribute of a record with further fields: log.info(..., extra={FIELDS: {...}})
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
_OURS = "shardray"
_TEXT = "%(asctime)s %(levelname)s %(message)s"


def configure_logs(settings: LoggingSettings) -> None:
    """Write to stderr from now on. ``level`` is that of shardray's loggers; other libraries say warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_OURS).setLevel(settings.level.upper())
    logging.captureWarnings(settings.format == "json")  # else they would be lines that are no JSON


class TextFormatter(logging.Formatter):
    """``2026-11-23 12:03:04,051 WARNING ...``, and which request it is about."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = _request_id(record)
        line = super().formatMessage(record)
        return line if request_id is None or request_id in line else f"{line} (request {request_id})"


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; request_id, further fields and the exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := _request_id(record)) is not None:
            line["request_id"] = request_id
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _request_id(record: logging.LogRecord) -> str | None:
    own: str | None = getattr(record, FIELDS, {}).get("request_id")
    return own or REQUEST_ID.get()
