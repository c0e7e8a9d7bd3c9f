"""Calls of Ray that block, made in a thread, with one plain error in place of Ray's many kinds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import ray

from shardray.runtime.cluster.errors import ClusterError

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def in_ray(call: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T:
    """What ``call`` returns. Raises ClusterError."""
    try:
        return await asyncio.to_thread(call, *args, **options)
    except Exception as error:  # Ray's boundary: RayError, RuntimeError, ValueError, gRPC's, and more
        raise ClusterError(f"Ray: {in_one_line(error)}") from error


async def cluster_answers(timeout_s: float) -> bool:
    """Whether Ray's head can be reached from here."""
    asked = asyncio.ensure_future(in_ray(ray.nodes))
    asked.add_done_callback(lambda nodes: nodes.exception())  # it may come when nobody waits any longer
    done, _ = await asyncio.wait({asked}, timeout=timeout_s)
    return bool(done) and asked.exception() is None


def in_one_line(error: BaseException) -> str:
    """An error of Ray's, whose text has several."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
