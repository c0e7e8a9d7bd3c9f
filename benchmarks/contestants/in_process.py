"""shardray in this process: ``LLM``. Each request is streamed to a thread of its own, as a program would."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from benchmarks.contestants.base import main, now_s
from benchmarks.contestants.engine_figures import KV_MEMORY_BYTES, figures
from benchmarks.protocol import Request, Setup, Trace
from shardray.runtime.engine.llm import LLM
from shardray.runtime.engine.request import SamplingParams


class InProcess:
    """Options of the label: ``tp`` and ``pp``, the shard counts; all shards but one are in processes of their own."""

    def __init__(self, setup: Setup) -> None:
        self.details: dict[str, Any] = {"versions": {name: version(name) for name in ("shardray", "torch")}}
        self._llm = LLM(
            setup.model_dir,
            dtype=setup.dtype,
            tensor_parallel_size=int(setup.options.get("tp", 1)),
            pipeline_parallel_size=int(setup.options.get("pp", 1)),
            max_num_seqs=setup.max_num_seqs,
            kv_memory_bytes=KV_MEMORY_BYTES,
            num_threads=setup.num_threads,
        )
        self._readers = ThreadPoolExecutor(setup.max_num_seqs)

    def prepare(self, requests: list[Request]) -> None:
        """Nothing: batches form as requests come."""

    def serve(self, requests: list[Request]) -> list[Trace]:
        began_s = now_s()
        traces = [Trace(began_s + request.arrival_s) for request in requests]
        readers = []
        for request, trace in sorted(zip(requests, traces, strict=True), key=lambda pair: pair[0].arrival_s):
            time.sleep(max(0.0, trace.submitted_s - now_s()))
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.max_tokens)
            readers.append(self._readers.submit(_read, self._llm.stream(request.prompt_ids, params), trace))
        for reader in readers:
            reader.result()
        return traces

    def sample(self) -> dict[str, float]:
        return figures(self._llm.stats())

    def close(self) -> None:
        self._llm.close()  # first: what the readers wait for ends with it
        self._readers.shutdown(cancel_futures=True)


def _read(deltas: Any, trace: Trace) -> None:
    for delta in deltas:
        trace.add(list(delta.token_ids), now_s())


if __name__ == "__main__":
    main(InProcess)
