"""``transformers`` on the mixed workload of ``python -m benchmarks gpu``: seconds for all requests, after a warm-up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

_BATCH = 32  # of static batches, by length of the prompt
_PAGE_SIZE = 256  # of continuous batches; its own default
_BATCH_TOKENS = 8192  # in a step of continuous batches: as many as shardray reads beside them
_NO_EOS = -1
_STEP = 128  # lengths are rounded up to it, so that few shapes are compiled
Requests = list[tuple[list[int], int]]  # the prompt, and the tokens that are wanted


def transformers_continuous(folder: Path, device: torch.device, requests: Requests) -> float:
    with continuous_manager(folder, device, requests) as manager:
        return _timed(lambda some: serve_continuously(manager, some), requests, device)


@contextlib.contextmanager
def continuous_manager(folder: Path, device: torch.device, requests: Requests) -> Iterator[Any]:
    """With pages for all of ``requests`` at once, and its decode steps recorded on a GPU.

    It serves in a thread of its own. By itself it would take pages for most of the memory, and masks as wide as all
    of them.
    """
    config = ContinuousBatchingConfig(
        page_size=_PAGE_SIZE,
        num_blocks=sum(-(-(len(prompt) + count) // _PAGE_SIZE) for prompt, count in requests) + 1,
        max_batch_tokens=_BATCH_TOKENS,
    )
    hints = WorkloadHints(
        max_prompt_length=max(len(prompt) for prompt, _ in requests),
        max_generated_length=max(count for _, count in requests),
        num_requests=len(requests),
    )
    model = _model(folder, device, "paged|sdpa")
    with model.continuous_batching_context_manager(
        generation_config=_config(eos_token_id=_NO_EOS),
        continuous_batching_config=config,
        workload_hints=hints,
        timeout=5.0,
    ) as manager:
        yield manager


def serve_continuously(manager: Any, requests: Requests) -> list[int]:
    """Tokens that each request got: as many as it wants. Raises RuntimeError where that fails."""
    ids = [manager.add_request(prompt, max_new_tokens=count, eos_token_id=_NO_EOS) for prompt, count in requests]
    lens: dict[str, int] = {}
    while len(lens) < len(ids):
        result = manager.get_result(timeout=1.0)
        if result is None and not manager.is_running():
            raise RuntimeError("the batching thread has ended")
        if result is not None and result.error:
            raise RuntimeError(result.error)
        if result is not None and result.is_finished():
            lens[result.request_id] = len(result.generated_tokens)
    return [lens[request_id] for request_id in ids]


def transformers_static(folder: Path, device: torch.device, requests: Requests) -> float:
    model = _model(folder, device, "sdpa")

    def run(some: Requests) -> None:
        ordered = sorted(some, key=lambda request: len(request[0]))
        for first in range(0, len(ordered), _BATCH):
            batch = ordered[first : first + _BATCH]
            width = -(-max(len(prompt) for prompt, _ in batch) // _STEP) * _STEP
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch], device=device)
            most = max(count for _, count in batch)
            config = _config(max_new_tokens=most, cache_implementation="static")  # which is compiled on a GPU
            model.generate(ids, attention_mask=mask, generation_config=config)

    return _timed(run, requests, device)


def _config(**options: Any) -> Any:
    kind: Any = GenerationConfig
    return kind(**{"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options)


def _model(folder: Path, device: torch.device, attention: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def _timed(run: Callable[[Requests], object], requests: Requests, device: torch.device) -> float:
    with torch.no_grad():  # inference mode would not reach the thread in which continuous batches run
        run(requests)  # compiles, and reserves memory
        begin_s = time.perf_counter()
        run(requests)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin_s
