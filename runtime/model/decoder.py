"""One rank's part of a decoder: the layers of its stage, its heads and columns of each, and the ends that it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import VocabParallelEmbedding, VocabParallelHead
from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.attention import KVPages, StepView
from shardray.runtime.model.blocks import DecoderLayer, Parameters, norm_weights
from shardray.runtime.model.kernels.ops import Ops
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.rotary import rotary_table
from shardray.runtime.model.spec import DecoderSpec, Learned, Rotary
from shardray.runtime.model.stack import LayerStack

Progress = Callable[[float], None]


class ShardedDecoder:
    """Loads and runs one rank's part: token ids or hidden states in, hidden states or logits out."""

    def __init__(
        self, spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int, comm: Comm, ops: Ops,
        loader: ParameterLoader, device: torch.device, max_positions: int, progress: Progress = lambda fraction: None,
    ) -> None:  # fmt: skip
        layers = plan.stages[stage]
        kv_of_head = plan.kv_of_heads(tp_rank)
        self.embedding = _Embedding(spec, plan, tp_rank, comm, _to(device, loader.embedding())) if stage == 0 else None
        blocks: list[DecoderLayer] = []
        for index in layers:
            blocks.append(DecoderLayer(spec, kv_of_head, _to(device, loader.layer(index)), comm, ops))
            progress((index - layers.start + 1) / len(layers))
        self.layers = LayerStack(blocks, _rotary(spec, max_positions, device), max_positions, device)
        last = stage == plan.pp_size - 1
        self.head = _Head(spec, plan, comm, ops, _to(device, loader.head())) if last else None
        parts = [self.embedding, *blocks, self.head]
        self.num_bytes = sum(part.num_bytes for part in parts if part is not None)

    def __call__(self, x: Tensor | None, pages: KVPages, view: StepView) -> Tensor | None:
        """Hidden states of the stage before (None on the first) to hidden states (T, H), or on the last stage the
        logits (S, V) float32 of ``view.sampled_tokens`` on tensor rank 0 and None on the others."""
        if self.embedding is not None:
            x = self.embedding(view)
        assert x is not None
        x, delta = self.layers(x, pages, view)
        return x + delta if self.head is None else self.head(x, delta, view)


class _Embedding:
    def __init__(self, spec: DecoderSpec, plan: ShardPlan, tp_rank: int, comm: Comm, parameters: Parameters) -> None:
        weight = parameters["embed.weight"]
        self._tokens = VocabParallelEmbedding(weight, plan.vocab[tp_rank].start, comm)
        self._positions = parameters.get("positions.weight")
        self._offset = spec.positions.offset if isinstance(spec.positions, Learned) else 0
        self.num_bytes = weight.numel() * weight.element_size()

    def __call__(self, view: StepView) -> Tensor:
        x = self._tokens(view.token_ids)
        return x if self._positions is None else x + self._positions[view.positions + self._offset]


class _Head:
    def __init__(self, spec: DecoderSpec, plan: ShardPlan, comm: Comm, ops: Ops, parameters: Parameters) -> None:
        self._ops = ops
        self._norm = norm_weights(spec.norm, "final_norm", parameters)
        self._logits = VocabParallelHead(parameters["head.weight"], [len(block) for block in plan.vocab], comm)
        self.num_bytes = self._logits.num_bytes

    def __call__(self, x: Tensor, delta: Tensor, view: StepView) -> Tensor | None:
        if view.sampled_tokens.numel() == 0:
            return None
        _, normed = self._ops.add_norm(self._norm, x[view.sampled_tokens], delta[view.sampled_tokens])
        return self._logits(normed)


def _rotary(spec: DecoderSpec, max_positions: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    if not isinstance(spec.positions, Rotary):
        return None
    cos, sin = rotary_table(spec.positions, max_positions)
    return cos.to(device), sin.to(device)


def _to(device: torch.device, parameters: Parameters) -> Parameters:
    return {name: tensor.to(device) for name, tensor in parameters.items()}
