"""The engine in process, no Ray, no gRPC: the same scheduler, sampler and blocks as a fleet runs."""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import cast

import msgspec
import torch
from torch import Tensor

from shardray.runtime.engine.assignment import ShardAssignment
from shardray.runtime.engine.grammars import check_constraint
from shardray.runtime.engine.local_ranks import form_here
from shardray.runtime.engine.output import Delta, OutputText
from shardray.runtime.engine.request import EngineRequest, EngineStats, FieldError, FinishReason, SamplingParams
from shardray.runtime.engine.streams import Inbox, Mailroom, Prompt, Streamed, Streams
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.spec import Pooling
from shardray.runtime.model.tokenizer import Tokenizer


@dataclass
class Completion:
    """One finished request. ``logprobs`` are the chosen tokens', where asked for."""

    prompt_ids: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None  # why it ended with FinishReason.ERROR

    def add(self, streamed: Streamed) -> None:
        """What came next."""
        delta, output = streamed.delta, streamed.output
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason, self.error = delta.finish_reason, output.error
        if output.logprob is not None:
            self.logprobs.append(output.logprob)
            self.top_logprobs.append(output.top_logprobs)


class LLM:
    """A model on the devices of this machine.

    ``source`` is what ``shardray pull`` takes: a name, a hub id, a folder, a ``.gguf`` file. ``device`` is ``cpu``,
    ``cuda``, ``cuda:0`` or ``auto``. With several shards the first is in this process, and each of the others in one of
    its own, on ``cuda`` with the next device; ``num_threads`` is for each. ``record_steps``: whether decode steps run
    as they were recorded, where they can be (None: on GPUs, as CUDA graphs). ``max_draft_tokens``: tokens of a request
    that a step may guess and check where the text repeats, which changes none of them. ``prefix_caching``: whether
    requests that begin with the same tokens share what was computed of them. ``skip_tokenizer_init``: prompts are token
    ids, and no text is made of the output. Use it as a context manager, or call ``close``. Raises ModelConfigError,
    PlanError, CheckpointError or MemoryError for what cannot be served, MeshError for a shard that cannot form.
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
        max_prefill_beside_decodes: int | None = None,
        max_draft_tokens: int = 0,
        prefix_caching: bool = True,
        kv_memory_bytes: int | None = None,
        memory_utilization: float = 0.9,
        num_threads: int | None = None,
        record_steps: bool | None = None,
        skip_tokenizer_init: bool = False,
    ) -> None:
        folder = resolve_model(str(source))
        self.tokenizer = None if skip_tokenizer_init else Tokenizer.load_optional(folder)
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
                max_prefill_beside_decodes=max_prefill_beside_decodes,
                max_draft_tokens=max_draft_tokens,
                prefix_caching=prefix_caching,
                kv_memory_bytes=kv_memory_bytes,
                memory_utilization=memory_utilization,
                record_steps=record_steps,
            )
        )
        self._engine = self._mesh.engine
        self._mailroom = Mailroom()
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
        streams, completions = self.streams(), []
        try:
            for prompt, own in zip(batch, each, strict=True):
                prompt_ids = self._ids(prompt)
                streams.add(prompt_ids, own)
                completions.append(Completion(prompt_ids))
            for streamed in streams:
                completions[streamed.number].add(streamed)
        finally:
            streams.close()
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of one completion as they come. Dropping the iterator cancels the request."""
        streams = self.streams()
        streams.add(prompt, params)
        deltas = _deltas(streams)
        weakref.finalize(deltas, streams.close)  # what was never begun has nothing to finish
        return deltas

    def streams(self) -> Streams:
        """Several requests, to be added and read by one thread. Close it if you leave before its end."""
        return Streams(self._start, self._engine.cancel)

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> Completion:
        """Complete a conversation with the model's chat template."""
        return self.generate(self._need_tokenizer().apply_chat_template(messages), params)[0]

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: Pooling | None = None) -> list[Tensor]:
        """The embedding of one prompt or of each of a batch, (hidden_size,) float32; ``pooling`` None: the model's own.

        Raises FieldError for a model that generates, and for a prompt that is too long for it.
        """
        pooling = pooling or self._engine.info.default_pooling or Pooling()
        streams, batch = self.streams(), _as_batch(prompts)
        embeddings = {}
        try:
            for prompt in batch:
                streams.add(prompt, SamplingParams(seed=0), pooling)
            for number, _, output in streams:
                if output.embedding is None:
                    raise RuntimeError(output.error or "the engine ended the request without an embedding")
                embeddings[number] = output.embedding
        finally:
            streams.close()
        return [torch.frombuffer(bytearray(embeddings[i]), dtype=torch.float32) for i in range(len(batch))]

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

    def _start(
        self, prompt: Prompt, params: SamplingParams | None, pooling: Pooling | None, inbox: Inbox
    ) -> tuple[str, OutputText]:
        params = params or SamplingParams()
        if params.constraint is not None:
            if self.tokenizer is None:
                raise FieldError(params.constraint.kind, "needs the tokenizer, which is not there, or not asked for")
            check_constraint(params.constraint)
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(64))
        prompt_ids = self._ids(prompt)
        request = EngineRequest(request_id=secrets.token_hex(8), prompt_ids=prompt_ids, params=params, pooling=pooling)
        text = OutputText(self.tokenizer, params, prompt_ids)
        self._mailroom.open(request.request_id, inbox)
        try:
            self._engine.submit(request)
        except Exception:
            self._mailroom.forget(request.request_id)
            raise
        return request.request_id, text

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer (no tokenizer.json, or not asked for); give prompts as token ids")
        return self.tokenizer

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the LLM was closed")
        try:
            self._engine.run(self._mailroom.deliver)
        except Exception as error:
            failure = error
        self._mailroom.fail(failure)


def _deltas(streams: Streams) -> Iterator[Delta]:
    try:
        for streamed in streams:
            yield streamed.delta
    finally:
        streams.close()


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))
