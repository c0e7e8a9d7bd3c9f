"""vLLM in this process: its engine, step by step, as its ``LLM`` class drives it.

Prefixes are not kept unless the label asks: the same prompt is served several times. Runs in vLLM's environment:
imports nothing else that has to be installed, and vLLM only after its environment variables are set.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

from benchmarks.contestants.base import main
from benchmarks.contestants.stepping import serve_by_steps
from benchmarks.protocol import Request, Setup, Trace

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: as much as shardray gets, rounded up
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the harness has bound the process
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Vllm:
    """Options of the label: ``prefix=1`` keeps prefixes, ``eager=1`` compiles nothing, ``tp`` and ``pp`` cut it."""

    def __init__(self, setup: Setup) -> None:
        os.environ |= _ENVIRONMENT | {"OMP_NUM_THREADS": str(setup.num_threads)}
        os.environ["PATH"] = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))  # ninja is there
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        options = setup.options
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=setup.model_dir,
                dtype=setup.dtype,
                skip_tokenizer_init=True,
                max_model_len=setup.max_model_len,
                max_num_seqs=setup.max_num_seqs,
                enable_prefix_caching=options.get("prefix") == "1",
                enforce_eager=options.get("eager") == "1",
                tensor_parallel_size=int(options.get("tp", 1)),
                pipeline_parallel_size=int(options.get("pp", 1)),
                disable_log_stats=True,
            )
        )
        self._num_served = 0
        self.details: dict[str, Any] = {"versions": {name: version(name) for name in ("vllm-cpu", "torch")}}

    def prepare(self, requests: list[Request]) -> None:
        """Nothing: batches form as requests come."""

    def serve(self, requests: list[Request]) -> list[Trace]:
        self._num_served += 1
        return serve_by_steps(self, requests)

    def add(self, index: int, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(f"{self._num_served}-{index}", {"prompt_token_ids": request.prompt_ids}, params)

    def step(self) -> list[tuple[int, list[int]]]:
        outputs = self._engine.step()
        return [(int(one.request_id.split("-")[1]), list(one.outputs[0].token_ids)) for one in outputs]

    def sample(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing beside the process."""


if __name__ == "__main__":
    main(Vllm)
