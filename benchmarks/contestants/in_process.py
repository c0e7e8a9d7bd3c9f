"""shardray in this process: ``LLM``. One thread adds requests and reads their tokens, without making text of them."""

from __future__ import annotations

from collections import deque
from importlib.metadata import version
from typing import Any

from benchmarks.contestants.base import main, now_s
from benchmarks.contestants.engine_figures import KV_MEMORY_BYTES, figures
from benchmarks.protocol import Request, Setup, Trace
from shardray.runtime.engine.llm import LLM
from shardray.runtime.engine.request import SamplingParams


class InProcess:
    """Options of the label: ``tp`` and ``pp``, the shard counts; all shards but one are in processes of their own.

    ``prefix=1`` keeps prefixes; otherwise the same prompt is computed in every pass. ``drafts``: its
    ``max_draft_tokens``. No peer has the like here, so that it is 0 where they are compared.
    """

    def __init__(self, setup: Setup) -> None:
        self.details: dict[str, Any] = {"versions": {name: version(name) for name in ("shardray", "torch")}}
        self._llm = LLM(
            setup.options.get("quantized", setup.model_dir),
            dtype=setup.activations_dtype,
            tensor_parallel_size=int(setup.options.get("tp", 1)),
            pipeline_parallel_size=int(setup.options.get("pp", 1)),
            max_num_seqs=setup.max_num_seqs,
            kv_memory_bytes=KV_MEMORY_BYTES,
            num_threads=setup.num_threads,
            max_draft_tokens=int(setup.options.get("drafts", 0)),
            prefix_caching=setup.options.get("prefix") == "1",
            skip_tokenizer_init=True,
        )

    def prepare(self, requests: list[Request]) -> None:
        """Nothing: batches form as requests come."""

    def serve(self, requests: list[Request]) -> list[Trace]:
        began_s = now_s()
        traces = [Trace(began_s + request.arrival_s) for request in requests]
        coming = deque(sorted(range(len(requests)), key=lambda index: requests[index].arrival_s))
        streams, indices = self._llm.streams(), []
        while coming or streams.num_live:
            while coming and traces[coming[0]].submitted_s <= now_s():
                indices.append(coming.popleft())
                request = requests[indices[-1]]
                params = SamplingParams(
                    temperature=request.temperature, top_p=request.top_p, seed=indices[-1], ignore_eos=True,
                    max_tokens=request.max_tokens,
                )  # fmt: skip
                streams.add(request.prompt_ids, params)
            came = streams.poll(max(0.0, traces[coming[0]].submitted_s - now_s()) if coming else None)
            at_s = now_s()
            for index, delta, _ in came:
                traces[indices[index]].add(list(delta.token_ids), at_s)
        return traces

    def sample(self) -> dict[str, float]:
        return figures(self._llm.stats())

    def close(self) -> None:
        self._llm.close()


if __name__ == "__main__":
    main(InProcess)
