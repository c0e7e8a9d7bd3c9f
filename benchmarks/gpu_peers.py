"""``transformers`` on the mixed workload of ``python -m benchmarks gpu``: seconds for all requests, after a warm-up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

_BATCH = 32  # of static batches, by length of the prompt
_STEP = 128  # lengths are rounded up to it, so that few shapes are compiled
Requests = list[tuple[list[int], int]]  # the prompt, and the tokens that are wanted


def transformers_continuous(folder: Path, device: torch.device, requests: Requests) -> float:
    model = _model(folder, device, "paged|sdpa")
    longest = max(count for _, count in requests)

    def run(some: Requests) -> None:
        # This call has one limit for all requests; in groups of like ones, nobody waits for a far longer one.
        for limit in sorted({_rounded(count, 32, longest) for _, count in some}):
            own = [prompt for prompt, count in some if _rounded(count, 32, longest) == limit]
            config = _config(max_new_tokens=limit, eos_token_id=-1)
            found = model.generate_batch(inputs=own, generation_config=config, progress_bar=False)
            if len(found) < len(own) or any(output.error for output in found.values()):
                raise RuntimeError("not every request was answered")

    return _timed(run, requests, device)


def transformers_static(folder: Path, device: torch.device, requests: Requests) -> float:
    model = _model(folder, device, "sdpa")

    def run(some: Requests) -> None:
        ordered = sorted(some, key=lambda request: len(request[0]))
        for first in range(0, len(ordered), _BATCH):
            batch = ordered[first : first + _BATCH]
            width = _rounded(max(len(prompt) for prompt, _ in batch), _STEP, None)
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


def _rounded(count: int, step: int, most: int | None) -> int:
    rounded = -(-count // step) * step
    return rounded if most is None else min(rounded, most)


def _timed(run: Any, requests: Requests, device: torch.device) -> float:
    with torch.no_grad():  # inference mode would not reach the thread in which continuous batches run
        run(requests)  # compiles, and reserves memory
        begin_s = time.perf_counter()
        run(requests)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin_s
