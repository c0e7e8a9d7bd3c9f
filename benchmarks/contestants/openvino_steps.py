"""OpenVINO GenAI in this process: its continuous batching pipeline, step by step.

Keys and values are kept in the model's dtype (its default on CPUs is 8 bits), and prefixes only where the label asks.
Runs in OpenVINO's environment: imports nothing else that has to be installed.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.contestants.base import main
from benchmarks.contestants.stepping import serve_by_steps
from benchmarks.protocol import INT8, Request, Setup, Trace

_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", INT8: "bf16"}
_KV_GIB = 2  # as much as shardray gets, rounded up
_BATCH_TOKENS = 2048  # with fewer, prompts wait longer and streams that run are held up less


class OpenVino:
    """Options of the label: ``converted``, the model, added by the harness; ``prefix=1`` keeps prefixes; ``kv``, the
    type of keys and values: u8, bf16, f16, f32; ``batch``, the most tokens of a step (its own default is 256)."""

    def __init__(self, setup: Setup) -> None:
        precision = _TYPES[setup.dtype]
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _KV_GIB
        scheduler.max_num_seqs = setup.max_num_seqs
        scheduler.max_num_batched_tokens = int(setup.options.get("batch", _BATCH_TOKENS))
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = setup.options.get("prefix") == "1"
        properties = {
            "INFERENCE_NUM_THREADS": setup.num_threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": setup.options.get("kv", precision),
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            setup.options["converted"], scheduler, "CPU", properties
        )
        self._handles: dict[int, Any] = {}
        self._num_added = 0
        self.details: dict[str, Any] = {
            "versions": {name: version(name) for name in ("openvino", "openvino-genai")},
            "properties": properties | {"max_num_batched_tokens": scheduler.max_num_batched_tokens},
        }

    def prepare(self, requests: list[Request]) -> None:
        """Nothing: batches form as requests come."""

    def serve(self, requests: list[Request]) -> list[Trace]:
        self._handles = {}
        return serve_by_steps(self, requests)

    def add(self, index: int, request: Request) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.max_tokens
        config.ignore_eos = True
        config.do_sample = request.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = request.temperature, request.top_p
        token_ids = openvino.Tensor(np.array([request.prompt_ids], dtype=np.int64))
        self._num_added += 1
        self._handles[index] = self._pipeline.add_request(self._num_added, token_ids, config)

    def step(self) -> list[tuple[int, list[int]]]:
        self._pipeline.step()
        tokens = []
        for index, handle in self._handles.items():
            while handle.can_read():
                tokens += [(index, list(output.generated_ids)) for output in handle.read().values()]
        return tokens

    def sample(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing beside the process."""


if __name__ == "__main__":
    main(OpenVino)
