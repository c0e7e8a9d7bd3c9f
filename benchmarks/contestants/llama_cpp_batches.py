"""llama.cpp through the low-level interface of ``llama-cpp-python``, with continuous batching as its server does it.

Each request is a sequence of its own in one context (``n_seq_max``). Every step is one ``llama_decode`` of a batch that
holds the next token of each running sequence and fills up with prompt tokens; llama.cpp's own samplers choose.
Runs in llama.cpp's environment: imports nothing else that has to be installed.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any

import llama_cpp

from benchmarks.contestants.base import main
from benchmarks.contestants.slots import Sequence, Slots
from benchmarks.contestants.stepping import serve_by_steps
from benchmarks.protocol import Request, Setup, Trace

MAX_NUM_SEQS = 256  # of llama.cpp's own
_BATCH_TOKENS = 2048  # llama.cpp's default
_LEN_STEP = 256  # llama.cpp rounds the length of a sequence up to this
_LOG_LEVEL_ERROR = 3  # of ggml; the package does not export it


class LlamaCpp:
    """Options of the label: ``gguf``, the path of the model, added by the harness; ``unified=1``, one KV buffer for all
    sequences instead of one each."""

    def __init__(self, setup: Setup) -> None:
        self._silence = llama_cpp.llama_log_callback(_only_errors)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._num_threads = setup.num_threads
        self._unified = setup.options.get("unified") == "1"
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(setup.options["gguf"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {setup.options['gguf']}")
        self._samplers: dict[tuple[float, float], Any] = {}  # by temperature and top_p
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._context: Any = None
        self._shape = (0, 0)
        self._slots = Slots(0)
        self._open([setup.first])
        self.details: dict[str, Any] = {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "features": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def prepare(self, requests: list[Request]) -> None:
        self._open(requests)

    def serve(self, requests: list[Request]) -> list[Trace]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._slots = Slots(self._shape[0])
        return serve_by_steps(self, requests)

    def add(self, index: int, request: Request) -> None:
        self._slots.add(Sequence.of(index, request))

    def step(self) -> list[tuple[int, list[int]]]:
        self._slots.admit()
        tokens = self._compute()
        memory = llama_cpp.llama_get_memory(self._context)
        for seq_id in self._slots.release_ended():
            llama_cpp.llama_memory_seq_rm(memory, seq_id, -1, -1)
        return tokens

    def sample(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        for sampler in self._samplers.values():
            llama_cpp.llama_sampler_free(sampler)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _open(self, requests: list[Request]) -> None:
        """A context with room for ``requests``, as many at once as there are, up to MAX_NUM_SEQS."""
        longest = max(request.total_len for request in requests)
        shape = (min(len(requests), MAX_NUM_SEQS), -(-longest // _LEN_STEP) * _LEN_STEP)
        if shape == self._shape:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = shape[0]
        params.n_ctx = shape[0] * shape[1]
        params.n_batch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._num_threads
        params.kv_unified = self._unified
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot open a context of {shape[0]} sequences of {shape[1]} tokens")
        self._shape = shape

    def _compute(self) -> list[tuple[int, list[int]]]:
        """One token more for each sequence whose prompt is through, and as many prompt tokens as fit beside them."""
        batch = self._batch
        batch.n_tokens = 0
        sampling: list[tuple[int, Sequence]] = []  # (place in the batch, sequence)
        for seq_id, sequence, num_tokens in self._slots.plan(_BATCH_TOKENS):
            for _ in range(num_tokens):
                self._add(sequence.pending.popleft(), sequence.num_done, seq_id)
                sequence.num_done += 1
            if not sequence.pending:
                batch.logits[batch.n_tokens - 1] = 1
                sampling.append((batch.n_tokens - 1, sequence))
        if (code := llama_cpp.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode failed with code {code}")
        tokens = []
        for place, sequence in sampling:
            sampler = self._sampler(sequence.temperature, sequence.top_p)
            token_id = llama_cpp.llama_sampler_sample(sampler, self._context, place)
            sequence.pending.append(token_id)
            sequence.num_left -= 1
            tokens.append((sequence.index, [token_id]))
        return tokens

    def _sampler(self, temperature: float, top_p: float) -> Any:
        """One for all sequences that have the same."""
        if (temperature, top_p) not in self._samplers:
            chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            if temperature == 0.0:
                parts = [llama_cpp.llama_sampler_init_greedy()]
            else:
                parts = [
                    llama_cpp.llama_sampler_init_top_p(top_p, 1),
                    llama_cpp.llama_sampler_init_temp(temperature),
                    llama_cpp.llama_sampler_init_dist(0),
                ]
            for part in parts:
                llama_cpp.llama_sampler_chain_add(chain, part)
            self._samplers[temperature, top_p] = chain
        return self._samplers[temperature, top_p]

    def _add(self, token_id: int, position: int, seq_id: int) -> None:
        batch, place = self._batch, self._batch.n_tokens
        batch.token[place] = token_id
        batch.pos[place] = position
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = seq_id
        batch.logits[place] = 0
        batch.n_tokens = place + 1


def _only_errors(level: int, text: bytes, _: Any) -> None:
    if level == _LOG_LEVEL_ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


if __name__ == "__main__":
    main(LlamaCpp)
