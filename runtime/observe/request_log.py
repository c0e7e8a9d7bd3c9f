"""One line for each request that has ended, at level info: its id, how it ended, counts and times. Never its text."""

from __future__ import annotations

import logging
import time

from shardray.runtime.driver.live import LiveRequest
from shardray.runtime.driver.observer import RequestObserver
from shardray.runtime.observe.logs import FIELDS

_log = logging.getLogger(__name__)


class RequestLog(RequestObserver):
    """Writes nothing, and takes no time, above level info."""

    def on_end(self, live: LiveRequest) -> None:
        if not _log.isEnabledFor(logging.INFO) or (end := live.stream.end) is None:
            return
        entry, now_s = live.entry, time.monotonic()
        fields = {
            "request_id": live.request_id,
            "finish_reason": end.error or end.reason or "stop",
            "num_prompt_tokens": len(entry.prompt_ids),
            "num_output_tokens": len(entry.sent_ids),
            "replica_id": live.replica_id,
            "queue_s": _since(entry.accepted_s, entry.dispatched_s),
            "time_to_first_token_s": _since(entry.accepted_s, entry.first_token_s),
            "total_s": _since(entry.accepted_s, now_s),
        }
        told = ", ".join(
            f"{name} {value}" for name, value in fields.items() if value is not None and name != "request_id"
        )
        _log.info("request %s ended: %s", live.request_id, told, extra={FIELDS: fields})


def _since(begin_s: float, end_s: float | None) -> float | None:
    """Seconds, to a tenth of a millisecond."""
    return None if end_s is None else round(end_s - begin_s, 4)
