"""How fast this machine's CPUs are at what a step is made of, measured with the kernels that will run: some seconds.

Threads stand for hosts: kernels hold no interpreter lock, so several of them share memory and cores as hosts do.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from shardray.parallel.shm import usable
from shardray.runtime.engine.hardware import (
    USUAL_LINK_BYTES_PER_S,
    USUAL_MESSAGE_S,
    Hardware,
    Machine,
    Roofline,
    Speed,
)
from shardray.runtime.engine.launches import measure_launches
from shardray.runtime.engine.samples import AttentionSample, ProductSample, Run, SumSample
from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.model.costs import ring_sum

_TOKENS = (1, 4, 8, 16, 32, 64, 128)
_NUM_ROUNDS, _NUM_TRIES = 3, 3  # something else may come between for a round
_DECODE_ROWS, _DECODE_LEN, _PREFILL_LEN = 8, 1024, 512
_MANY_TOKENS = 256


def measure_hardware(served: ServedSpec, num_hosts: int, num_threads: int) -> Hardware:
    """Of each of ``num_hosts`` hosts of ``num_threads`` on this machine, for the layers and the dtype of a model."""
    at_once = max(1, min(num_hosts, len(os.sched_getaffinity(0)) // num_threads))
    message_s, link_bytes_per_s = _measure_sums(served)
    decode_launches, prefill_launches = measure_launches(num_threads)
    alone: list[Speed] = []
    together: list[Speed] = []  # stays empty for one host
    for _ in range(_NUM_ROUNDS):
        alone.append(_measure_speed(served, 1, num_threads))
        if num_hosts > 1:
            together.append(_measure_speed(served, at_once, num_threads))
    return Hardware(
        Speed.median(alone),
        link_bytes_per_s,
        message_s,
        decode_launches,
        prefill_launches,
        Machine(at_once, Speed.median(together)) if together else None,
        spread=max(Speed.spread(speeds) for speeds in (alone, together) if speeds),
    )


def _measure_speed(served: ServedSpec, num_hosts: int, num_threads: int) -> Speed:
    """Of each of some hosts that all work at once."""
    samples = [ProductSample(served.spec, served.dtype) for _ in range(num_hosts)]
    points = []
    for num_tokens in _TOKENS:
        took_s = _time_s([partial(sample.prepare, num_tokens) for sample in samples], num_threads)
        points.append((2.0 * num_tokens / samples[0].item_bytes, took_s / samples[0].num_bytes))
    # Reading is the limit with the model's groups of heads; with one group of all heads it is arithmetic.
    decodes = [
        AttentionSample(served, [1] * _DECODE_ROWS, _DECODE_LEN, num_kv_heads)
        for num_kv_heads in {served.spec.attention.num_kv_heads, 1}
    ]
    prefill = AttentionSample(served, [_PREFILL_LEN], _PREFILL_LEN)
    *decode_s, prefill_s = (
        _time_s([partial(one.prepare, num_threads)] * num_hosts, num_threads) for one in (*decodes, prefill)
    )
    of_decodes = (
        (one.work.flops / one.work.num_bytes, took_s / one.work.num_bytes)
        for one, took_s in zip(decodes, decode_s, strict=True)
    )
    return Speed(
        Roofline(tuple(points)),
        1 / points[0][1],
        Roofline(tuple(sorted(of_decodes))),
        prefill.work.flops / prefill_s,
    )


def _measure_sums(served: ServedSpec) -> tuple[float, float]:
    """(seconds a message, bytes a second) of a sum of two ranks; what is usual where they cannot share memory."""
    if not usable():
        return USUAL_MESSAGE_S, USUAL_LINK_BYTES_PER_S
    sums = SumSample()
    widths = served.spec.hidden_size, _MANY_TOKENS * served.spec.hidden_size
    few_s, many_s = (
        _time_s([partial(sums.prepare, rank, width, served.dtype) for rank in range(2)], 1) / sums.num_sums
        for width in widths
    )
    sent = ring_sum(2, (widths[1] - widths[0]) * served.item_bytes)
    return few_s / sent.num_messages, sent.num_bytes / max(many_s - few_s, 1e-9)


def _time_s(hosts: Sequence[Callable[[], Run]], num_threads: int) -> float:
    """Seconds that the slowest of some hosts takes for what it has prepared; the median of some tries."""
    barrier = threading.Barrier(len(hosts))

    def time_one(prepare: Callable[[], Run]) -> list[float]:
        torch.set_num_threads(num_threads)
        took_s = []
        try:
            with torch.inference_mode():
                run = prepare()
                for _ in range(_NUM_TRIES + 1):
                    barrier.wait()
                    began_s = time.perf_counter()
                    run()
                    took_s.append(time.perf_counter() - began_s)
        except BaseException:
            barrier.abort()  # the others would wait for ever
            raise
        return took_s[1:]  # the first warms up

    with ThreadPoolExecutor(len(hosts)) as threads:
        tries = zip(*threads.map(time_one, hosts), strict=True)
        return float(statistics.median(max(took_s) for took_s in tries))
