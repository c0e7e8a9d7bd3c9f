"""The parts of ``python -m benchmarks gpu``: each measures one thing and yields its records.

Each runs in a process of its own. Every share is of what the same device reached at copying and at
multiplying, minutes before.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.emitting import Record
from benchmarks.gpu_models import folder_of
from shardray import LLM, SamplingParams
from shardray.runtime.engine.recorded import RecordedSteps
from shardray.runtime.engine.shapes import cut
from shardray.runtime.model.costs import StepLoad, Work, step_cost
from shardray.runtime.model.families import read_model_config

_BFLOAT16_BYTES = 2


class GpuSetup(msgspec.Struct, frozen=True):
    """What a part is told."""

    device: str = "cuda:0"
    models: tuple[str, ...] = ("135M", "1B", "8B")
    batches: tuple[int, ...] = (1, 32, 128)
    context_len: int = 1024
    num_steps: int = 128  # that are timed
    prompts: tuple[int, ...] = (2048, 4096, 8192)
    mixed_model: str = "1B"
    num_mixed: int = 64
    peak_size: int = 8192  # of the matrices
    copy_bytes: int = 2 << 30
    root: str = "/dev/shm"
    bytes_per_s: float = 0.0  # measured by ``peaks``
    flops_per_s: float = 0.0


TINY = GpuSetup(
    device="cpu", models=("tiny",), batches=(1, 3), context_len=40, num_steps=4, prompts=(64,), mixed_model="tiny",
    num_mixed=4, peak_size=256, copy_bytes=1 << 20, root="/tmp",
)  # fmt: skip


def peaks(setup: GpuSetup) -> Iterator[Record]:
    """Bytes a second, read and written, of a large copy; operations a second of a large product in bfloat16."""
    device, size = torch.device(setup.device), setup.peak_size
    source = torch.empty(setup.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(device, lambda: target.copy_(source))
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product_s = _best_s(device, lambda: a @ b)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    yield {
        "part": "peaks", "device": name, "torch": str(torch.__version__), "bytes_per_s": 2 * setup.copy_bytes / copy_s,
        "flops_per_s": 2 * size**3 / product_s,
    }  # fmt: skip


def decode(setup: GpuSetup) -> Iterator[Record]:
    """A step of each model at each batch; the smallest model and batch first, for those matter most."""
    for name in setup.models:
        with _open(setup, name) as llm:
            for batch in setup.batches:
                step_s = _decode_step_s(llm, setup, batch)
                work = _work(setup, name, StepLoad(batch, 1, setup.context_len + setup.num_steps // 2))
                record = {
                    "part": "decode", "model": name, "batch": batch, "context_len": setup.context_len,
                    "step_ms": 1e3 * step_s, "tokens_per_s": batch / step_s,
                    "share_of_bandwidth": work.num_bytes / setup.bytes_per_s / step_s,
                }  # fmt: skip
                device_s = _recorded_step_s(llm, setup, batch)
                if device_s is not None:
                    record |= {"device_ms": 1e3 * device_s, "device_idle": max(0.0, 1 - device_s / step_s)}
                yield record
        del llm  # and with it the device's memory, before the next one is opened


def prefill(setup: GpuSetup) -> Iterator[Record]:
    """Prompts alone, each in one step."""
    for name in setup.models:
        with _open(setup, name) as llm:
            for num_tokens in setup.prompts:
                times_s = [_generate_s(llm, [num_tokens], 1) for _ in range(4)][1:]
                work = _work(setup, name, StepLoad(1, num_tokens, 0))
                yield {
                    "part": "prefill", "model": name, "prompt_len": num_tokens, "ms": 1e3 * min(times_s),
                    "share_of_peak": work.flops / setup.flops_per_s / min(times_s),
                }  # fmt: skip
        del llm


def load(setup: GpuSetup) -> Iterator[Record]:
    """From the page cache to a formed engine, without and with recorded steps."""
    for name in setup.models:
        folder_of(name, Path(setup.root))
        begin_s = time.perf_counter()
        with _open(setup, name, record_steps=False) as llm:
            load_s = time.perf_counter() - begin_s
            weight_bytes = llm._mesh._shard.info.weight_bytes
        del llm
        begin_s = time.perf_counter()
        with _open(setup, name, record_steps=True):
            both_s = time.perf_counter() - begin_s
        yield {
            "part": "load", "model": name, "load_s": load_s, "weight_bytes": weight_bytes,
            "record_s": max(0.0, both_s - load_s),
        }  # fmt: skip


def mixed(setup: GpuSetup) -> Iterator[Record]:
    """Requests of 16 to 512 tokens that want 16 to 256: here, and with transformers in two ways."""
    from benchmarks.gpu_peers import transformers_continuous, transformers_static

    chance, most = random.Random(0), setup.context_len // 2
    requests = [
        ([chance.randrange(3, 500) for _ in range(chance.randint(16, most))], chance.randint(16, most // 2 + 16))
        for _ in range(setup.num_mixed)
    ]
    num_tokens = sum(count for _, count in requests)
    with _open(setup, setup.mixed_model) as llm:
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in requests]
        llm.generate([prompt for prompt, _ in requests], params)
        begin_s = time.perf_counter()
        llm.generate([prompt for prompt, _ in requests], params)
        yield _mixed_record("shardray", setup, num_tokens, time.perf_counter() - begin_s)
    del llm
    for label, run in (("continuous", transformers_continuous), ("static", transformers_static)):
        _free(setup)
        try:
            seconds = run(folder_of(setup.mixed_model, Path(setup.root)), torch.device(setup.device), requests)
            yield _mixed_record(f"transformers, {label}", setup, num_tokens, seconds)
        except Exception as error:  # a peer that does not run here must not end what has been measured
            print(f"transformers, {label}: {type(error).__name__}: {error}", file=sys.stderr)


PARTS: dict[str, Callable[[GpuSetup], Iterator[Record]]] = {
    "peaks": peaks, "decode": decode, "prefill": prefill, "load": load, "mixed": mixed,
}  # fmt: skip


def _mixed_record(who: str, setup: GpuSetup, num_tokens: int, seconds: float) -> Record:
    return {
        "part": "mixed", "contestant": who, "model": setup.mixed_model, "requests": setup.num_mixed,
        "seconds": seconds, "tokens_per_s": num_tokens / seconds,
    }  # fmt: skip


def _open(setup: GpuSetup, name: str, record_steps: bool | None = None) -> LLM:
    _free(setup)
    longest = max(*setup.prompts, setup.context_len + 2 * setup.num_steps) + 64
    most = max(setup.batches)
    options: dict[str, Any] = {"kv_memory_bytes": 64 << 20} if setup.device == "cpu" else {}
    return LLM(
        folder_of(name, Path(setup.root)), device=setup.device, max_model_len=min(16384, longest), max_num_seqs=most,
        max_num_batched_tokens=max(8192, longest), max_prefill_beside_decodes=max(8192, longest),
        record_steps=record_steps, prefix_caching=False, **options,
    )  # fmt: skip


def _free(setup: GpuSetup) -> None:
    gc.collect()
    if setup.device != "cpu":
        torch.cuda.empty_cache()


def _decode_step_s(llm: LLM, setup: GpuSetup, batch: int) -> float:
    """What each further token of all sequences takes: the difference of two runs that begin alike.

    No sequence ends before the last prompt is read, in both.
    """
    most_read = max(8192, setup.context_len)  # tokens a step, at least: see ``_open``
    lens, few = [setup.context_len] * batch, 8 + 2 * (batch * setup.context_len // most_read)
    _generate_s(llm, lens, few)
    found = [
        (_generate_s(llm, lens, few + setup.num_steps) - _generate_s(llm, lens, few)) / setup.num_steps
        for _ in range(3)
    ]
    return max(1e-9, statistics.median(found))


def _generate_s(llm: LLM, prompt_lens: list[int], num_tokens: int) -> float:
    vocab_size = llm._engine.info.vocab_size
    prompts = [[(7 * i + row) % vocab_size for i in range(count)] for row, count in enumerate(prompt_lens)]
    begin_s = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
    return time.perf_counter() - begin_s


def _recorded_step_s(llm: LLM, setup: GpuSetup, batch: int) -> float | None:
    """What the device takes for the same step when nothing else holds it up; None if none is recorded.

    Its rows are those of the step before, so nothing that is served may run beside or after it on their pages.
    """
    recorded = llm._mesh._shard._runner._recorded
    if not isinstance(recorded, RecordedSteps):
        return None
    step = recorded._steps[next(size for size in recorded.sizes if size >= batch)]
    with torch.inference_mode():
        return _best_s(torch.device(setup.device), step._replay, num_runs=20)


def _work(setup: GpuSetup, name: str, step: StepLoad) -> Work:
    _, spec = read_model_config(folder_of(name, Path(setup.root)))
    cost = step_cost(spec, cut(spec, 1, 1, expert_parallel=False), 0, 0, step, _BFLOAT16_BYTES)
    return cost.products + cost.attention


def _best_s(device: torch.device, run: Callable[[], object], num_runs: int = 10) -> float:
    """The median of some runs that follow one another, after three to warm up; timed by the device if it is a GPU."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        times_s = []
        for _ in range(num_runs):
            begin_s = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - begin_s)
        return statistics.median(times_s)
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]  # type: ignore[no-untyped-call]
    for event in events[:-1]:
        event.record(torch.cuda.current_stream(device))
        run()
    events[-1].record(torch.cuda.current_stream(device))
    events[-1].synchronize()
    spans = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return float(statistics.median(spans)) / 1e3


def main() -> None:
    """``python -m benchmarks.gpu_parts PART SETUP``: one JSON line a record."""
    name, setup = sys.argv[1], msgspec.json.decode(sys.argv[2], type=GpuSetup)
    for record in PARTS[name](setup):
        sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
