"""``transformers`` with continuous batching: its own manager, in a thread of its own, over paged keys and values."""

from __future__ import annotations

import time
from collections import deque
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from benchmarks.contestants.base import main, now_s
from benchmarks.protocol import Request, Setup, Trace

_PAGE_SIZE = 64
_BATCH_TOKENS = 2048
_NO_EOS = -1


class HfContinuous:
    """Option of the label: ``attention``, sdpa (the default) or ``eager``; on CPUs there is no other."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.num_threads)
        model: Any = AutoModelForCausalLM.from_pretrained(
            setup.model_dir,
            dtype=getattr(torch, setup.dtype),
            attn_implementation=setup.options.get("attention", "sdpa"),
        )
        model.generation_config.eos_token_id = None
        model.generation_config.do_sample = False
        pages = -(-setup.max_model_len // _PAGE_SIZE) * setup.max_num_seqs
        config = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=min(pages, 1024),
            max_batch_tokens=_BATCH_TOKENS,
            max_requests_per_batch=setup.max_num_seqs,
            allow_block_sharing=False,
        )
        self._manager = model.init_continuous_batching(
            generation_config=model.generation_config, continuous_batching_config=config
        )
        self._manager.start()
        self._num_served = 0
        self.details: dict[str, Any] = {"versions": {name: version(name) for name in ("transformers", "torch")}}

    def prepare(self, requests: list[Request]) -> None:
        """Nothing: batches form as requests come."""

    def serve(self, requests: list[Request]) -> list[Trace]:
        self._num_served += 1
        began_s = now_s()
        traces = [Trace(began_s + request.arrival_s) for request in requests]
        coming = deque(sorted(range(len(requests)), key=lambda index: requests[index].arrival_s))
        num_left = len(requests)
        while num_left:
            while coming and traces[coming[0]].submitted_s <= now_s():
                self._add(coming[0], requests[coming.popleft()])
            wait_s = traces[coming[0]].submitted_s - now_s() if coming else 1.0
            result = self._manager.get_result(timeout=max(0.001, wait_s))
            if result is None:
                self._check_alive()
                continue
            index = int(result.request_id.split("-")[1])
            new = result.generated_tokens[len(traces[index].token_ids) :]
            traces[index].add(list(new), now_s())
            num_left -= len(traces[index].token_ids) == requests[index].max_tokens
        return traces

    def sample(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)

    def _add(self, index: int, request: Request) -> None:
        if request.temperature > 0:
            raise ValueError("transformers-cb is asked for greedy tokens alone")
        self._manager.add_request(
            request.prompt_ids,
            request_id=f"{self._num_served}-{index}",
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=_NO_EOS,
        )

    def _check_alive(self) -> None:
        if not self._manager.is_running():
            raise RuntimeError("the batching thread of transformers has ended")
        time.sleep(0)


if __name__ == "__main__":
    main(HfContinuous)
