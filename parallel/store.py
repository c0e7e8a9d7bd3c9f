"""The stores through which the groups of one mesh find each other: of a rendezvous for gloo, of torch for NCCL."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from shardray.parallel.greeting import listen_on

_POLL_S = 0.5


class MeetingStore(dist.Store):
    """Keys under ``name``, set and got with the two functions given: (key, value) and (keys, seconds to wait)."""

    def __init__(
        self,
        name: str,
        set_value: Callable[[str, bytes], None],
        get_values: Callable[[Sequence[str], float], list[bytes | None]],
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._name = name
        self._set_value = set_value
        self._get_values = get_values
        self._timeout_s = timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        self._set_value(self._own(key), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        (value,) = self._await([key], self._timeout_s)
        return value

    def check(self, keys: list[str]) -> bool:
        return None not in self._get_values([self._own(key) for key in keys], 0.0)

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        self._await(keys, self._timeout_s if timeout is None else timeout.total_seconds())

    def _await(self, keys: list[str], timeout_s: float) -> list[bytes]:
        own, deadline = [self._own(key) for key in keys], time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            values = self._get_values(own, max(0.0, min(_POLL_S, left_s)))
            if None not in values:
                return [value for value in values if value is not None]
            if left_s <= 0:
                raise dist.DistStoreError(f"timed out after {timeout_s:g} s waiting for {', '.join(own)}")

    def _own(self, key: str) -> str:
        return f"{self._name}/{key}"


def open_torch_store(bind_host: str) -> tuple[dist.Store, int]:
    """A store that listens on ``bind_host``, and its port. It asks nobody who they are."""
    listener = listen_on(bind_host)
    port: int = listener.getsockname()[1]
    descriptor = listener.detach()
    return dist.TCPStore(bind_host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor), port


def join_torch_store(host: str, port: int, timeout_s: float) -> dist.Store:
    return dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s))
