"""The engine in process, no Ray, no gRPC: the same scheduler, sampler and blocks as a fleet runs."""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import cast

import msgspec
import torch
from torch import Tensor

from shardray.runtime.engine.assignment import ShardAssignment
from shardray.runtime.engine.local_ranks import form_here
from shardray.runtime.engine.output import Delta, OutputText
from shardray.runtime.engine.request import EngineRequest, EngineStats, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.spec import Pooling
from shardray.runtime.model.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """One finished request. ``logprobs`` are the chosen tokens', where asked for."""

    prompt_ids: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class LLM:
    """A model on the devices of this machine.

    ``source`` is what ``shardray pull`` takes: a name, a hub id, a folder, a ``.gguf`` file. ``device`` is ``cpu``,
    ``cuda``, ``cuda:0`` or ``auto``. With several shards the first is in this process, and each of the others in one of
    its own, on ``cuda`` with the next device; ``num_threads`` is for each. ``record_steps``: whether decode steps run
    as they were recorded, where they can be (None: on GPUs, as CUDA graphs). Use it as a context manager, or call
    ``close``. Raises ModelConfigError, PlanError, CheckpointError or MemoryError for what cannot be served, MeshError
    for a shard that cannot form.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_memory_bytes: int | None = None,
        memory_utilization: float = 0.9,
        num_threads: int | None = None,
        record_steps: bool | None = None,
    ) -> None:
        folder = resolve_model(str(source))
        self.tokenizer = Tokenizer.load_optional(folder)
        num_ranks = tensor_parallel_size * pipeline_parallel_size
        self._mesh = form_here(
            ShardAssignment(
                epoch=secrets.token_hex(4),
                secret=secrets.token_hex(16),
                rank=0,
                tp_size=tensor_parallel_size,
                pp_size=pipeline_parallel_size,
                nodes=("",) * num_ranks,
                store_host="",
                store_port=0,
                bind_host="127.0.0.1",
                device="cpu" if device == "auto" and not torch.cuda.is_available() else device.replace("auto", "cuda"),
                num_threads=num_threads or max(1, len(os.sched_getaffinity(0)) // num_ranks),
                model_dir=str(folder),
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_memory_bytes=kv_memory_bytes,
                memory_utilization=memory_utilization,
                record_steps=record_steps,
            )
        )
        self._engine = self._mesh.engine
        self._streams: dict[str, queue.SimpleQueue[TokenOutput | BaseException]] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete one prompt or a batch, each text or token ids; one ``params`` for all or one for each.

        Raises FieldError for a request that cannot run.
        """
        batch = _as_batch(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(batch)
        streams = [self._start(prompt, own) for prompt, own in zip(batch, each, strict=True)]
        return [stream.read() for stream in streams]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of one completion as they come. Dropping the iterator cancels the request."""
        return self._start(prompt, params or SamplingParams()).deltas()

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> Completion:
        """Complete a conversation with the model's chat template."""
        return self.generate(self._need_tokenizer().apply_chat_template(messages), params)[0]

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: Pooling | None = None) -> list[Tensor]:
        """The embedding of one prompt or of each of a batch, (hidden_size,) float32; ``pooling`` None: the model's own.

        Raises FieldError for a model that generates, and for a prompt that is too long for it.
        """
        pooling = pooling or self._engine.info.default_pooling or Pooling()
        streams = [self._start(prompt, SamplingParams(seed=0), pooling) for prompt in _as_batch(prompts)]
        return [torch.frombuffer(bytearray(stream.read_embedding()), dtype=torch.float32) for stream in streams]

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Stop the engine; requests in flight end with an error."""
        self._engine.stop()
        self._thread.join()
        self._mesh.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, prompt: Prompt, params: SamplingParams, pooling: Pooling | None = None) -> _Stream:
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(64))
        prompt_ids = tuple(self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)
        request = EngineRequest(request_id=secrets.token_hex(8), prompt_ids=prompt_ids, params=params, pooling=pooling)
        stream = _Stream(self, request, OutputText(self.tokenizer, params, prompt_ids))
        self._streams[request.request_id] = stream.inbox
        try:
            self._engine.submit(request)
        except Exception:
            del self._streams[request.request_id]
            raise
        if self._failure is not None:
            stream.inbox.put(self._failure)
        return stream

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer.json; give prompts as token ids")
        return self.tokenizer

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the LLM was closed")
        try:
            self._engine.run(self._publish)
        except Exception as error:
            failure = error
        self._failure = failure
        for inbox in list(self._streams.values()):
            inbox.put(failure)

    def _publish(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            if (inbox := self._streams.get(output.request_id)) is not None:
                inbox.put(output)
                if output.finish_reason is not None:
                    del self._streams[output.request_id]

    def _cancel(self, request_id: str) -> None:
        self._engine.cancel(request_id)


class _Stream:
    """One request in flight."""

    def __init__(self, llm: LLM, request: EngineRequest, text: OutputText) -> None:
        self.inbox: queue.SimpleQueue[TokenOutput | BaseException] = queue.SimpleQueue()
        self._llm = llm
        self._request = request
        self._text = text

    def deltas(self) -> Iterator[Delta]:
        try:
            while not self._text.ended:
                yield self._text.push(self._next())
        finally:
            self._llm._cancel(self._request.request_id)

    def read(self) -> Completion:
        completion = Completion(self._request.prompt_ids)
        while not self._text.ended:
            output = self._next()
            delta = self._text.push(output)
            completion.text += delta.text
            completion.token_ids += delta.token_ids
            completion.finish_reason = delta.finish_reason
            if output.logprob is not None:
                completion.logprobs.append(output.logprob)
                completion.top_logprobs.append(output.top_logprobs)
            if delta.stopped:
                self._llm._cancel(self._request.request_id)
        return completion

    def read_embedding(self) -> bytes:
        embedding = self._next().embedding
        assert embedding is not None
        return embedding

    def _next(self) -> TokenOutput:
        output = self.inbox.get()
        if isinstance(output, BaseException):
            raise RuntimeError(f"the engine stopped: {output}") from output
        return output


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))
