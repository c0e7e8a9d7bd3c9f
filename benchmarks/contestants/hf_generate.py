"""``transformers``: ``generate`` with SDPA attention; several requests as static batches, padded on the left.

Batches of at most 32, in order of prompt length so that little is padded. A batch runs until its longest request has
all its tokens; surplus tokens of the others are not counted.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.contestants.base import main, now_s
from benchmarks.protocol import Request, Setup, Trace

MAX_BATCH = 32
_PAD_ID = 0
_CACHES = ("dynamic", "static")
_NUM_TRIAL_TOKENS = 16


class HfGenerate:
    """Option of the label: ``cache``, dynamic or static; the default is whichever is faster on the workload."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.num_threads)
        self._fixed_cache = setup.options.get("cache")
        if self._fixed_cache not in (None, *_CACHES):
            raise ValueError(f"transformers:cache={self._fixed_cache} is unknown; give {' or '.join(_CACHES)}")
        self._cache = self._fixed_cache or _CACHES[0]
        dtype = getattr(torch, setup.dtype)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            setup.model_dir, dtype=dtype, attn_implementation="sdpa"
        )
        self._model.generation_config.eos_token_id = None
        self.details: dict[str, Any] = {"versions": {name: version(name) for name in ("transformers", "torch")}}

    def prepare(self, requests: list[Request]) -> None:
        """Choose the cache on the workload's first batch."""
        if self._fixed_cache is None:
            batch = [requests[index] for index in _batches(requests)[0]]
            self._cache = min(_CACHES, key=lambda cache: self._trial_s(batch, cache))

    def serve(self, requests: list[Request]) -> list[Trace]:
        submitted_s = now_s()
        traces = [Trace(submitted_s) for _ in requests]
        for batch in _batches(requests):
            steps = self._generate([requests[index] for index in batch], self._cache)
            for row, index in enumerate(batch):
                for time_s, token_ids in steps[: requests[index].max_tokens]:
                    traces[index].add([token_ids[row]], time_s)
        return traces

    def sample(self) -> dict[str, float]:
        return {"uses_static_cache": float(self._cache == "static")}

    def close(self) -> None:
        """Nothing beside the process."""

    def _trial_s(self, batch: list[Request], cache: str) -> float:
        """Seconds for some decode steps, with a cache of the size that the whole batch needs."""
        times_s = [time_s for time_s, _ in self._generate(batch, cache, _NUM_TRIAL_TOKENS)]
        return times_s[-1] - times_s[len(times_s) // 4]

    @torch.inference_mode()
    def _generate(self, batch: list[Request], cache: str, stop_after: int | None = None) -> _Steps:
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        token_ids = [[_PAD_ID] * pad + request.prompt_ids for pad, request in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        steps = _StepStreamer()
        self._model.generate(
            torch.tensor(token_ids),
            attention_mask=torch.tensor(mask),
            **_sampling(batch[0]),
            max_new_tokens=max(request.max_tokens for request in batch),
            cache_implementation=cache,
            pad_token_id=_PAD_ID,
            streamer=steps,
            stopping_criteria=[_StopAfter(width + stop_after)] if stop_after is not None else [],
        )
        return steps.steps


def _sampling(request: Request) -> dict[str, Any]:
    if request.temperature == 0.0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}


_Steps = list[tuple[float, list[int]]]  # of each step its time and one token a row


class _StepStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.steps: _Steps = []
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            self.steps.append((now_s(), value.tolist()))
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing is held back."""


class _StopAfter:
    """A stopping criterion that leaves ``max_new_tokens``, and with it the size of a static cache, as it is."""

    def __init__(self, total_len: int) -> None:
        self._total_len = total_len

    def __call__(self, token_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((token_ids.shape[0],), token_ids.shape[1] >= self._total_len)


def _batches(requests: list[Request]) -> list[list[int]]:
    """Indices into ``requests``."""
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
    return [order[start : start + MAX_BATCH] for start in range(0, len(order), MAX_BATCH)]


if __name__ == "__main__":
    main(HfGenerate)
