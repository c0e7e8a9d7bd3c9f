"""One rank's part of a decoder: the layers of its stage, its heads and columns of each, and the ends that it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import VocabParallelEmbedding, VocabParallelHead
from shardray.parallel.plan import ShardPlan
from shardray.runtime.model.attention import KVPages, OwnHeads, StepView
from shardray.runtime.model.blocks import DecoderLayer
from shardray.runtime.model.kernels.ops import NormWeights, Ops
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.mlp import OwnExperts, Parameters
from shardray.runtime.model.spec import DecoderSpec
from shardray.runtime.model.stack import LayerStack

Progress = Callable[[float], None]


class ShardedDecoder:
    """Loads and runs one rank's part: token ids or hidden states in, hidden states or logits out."""

    def __init__(
        self, spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int, comm: Comm, ops: Ops,
        loader: ParameterLoader, device: torch.device, max_positions: int, progress: Progress = lambda fraction: None,
    ) -> None:  # fmt: skip
        layers = plan.stages[stage]
        heads = OwnHeads.of(plan, tp_rank)
        self.embedding = _Embedding(spec, plan, tp_rank, comm, _to(device, loader.embedding())) if stage == 0 else None
        blocks: list[DecoderLayer] = []
        for index in layers:
            parameters = _to(device, loader.layer(index))
            layer = spec.layers[index]
            blocks.append(DecoderLayer(layer, heads, OwnExperts.of(layer.mlp, plan, tp_rank), parameters, comm, ops))
            progress((index - layers.start + 1) / len(layers))
        self.layers = LayerStack(blocks, max_positions, device)
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
        if self.head is not None:
            return self.head(x, delta, view)
        return x if delta is None else x + delta


class _Embedding:
    def __init__(self, spec: DecoderSpec, plan: ShardPlan, tp_rank: int, comm: Comm, parameters: Parameters) -> None:
        weight, embedding = parameters["embed.weight"], spec.embedding
        self._tokens = VocabParallelEmbedding(weight, plan.vocab[tp_rank].start, comm)
        self._projection = parameters.get("embed_projection.weight")
        self._scale = torch.tensor(embedding.scale).to(weight.dtype).item()  # as rounded in the model's dtype
        self._positions = parameters.get("positions.weight")
        self._offset = embedding.positions.offset if embedding.positions is not None else 0
        self._norm = None if embedding.norm is None else NormWeights.of(embedding.norm, "embed_norm", parameters)
        self.num_bytes = weight.numel() * weight.element_size()

    def __call__(self, view: StepView) -> Tensor:
        x = self._tokens(view.token_ids)
        if self._projection is not None:
            x = F.linear(x, self._projection)
        if self._scale != 1.0:
            x = x * self._scale
        if self._positions is not None:
            x = x + self._positions[view.positions + self._offset]
        return x if self._norm is None else self._norm(x)


class _Head:
    def __init__(self, spec: DecoderSpec, plan: ShardPlan, comm: Comm, ops: Ops, parameters: Parameters) -> None:
        self._ops = ops
        self._spec = spec.head
        self._norm = None if spec.head.norm is None else NormWeights.of(spec.head.norm, "final_norm", parameters)
        self._projection = parameters.get("head_projection.weight")
        weight, bias = parameters["head.weight"], parameters.get("head.bias")
        self._logits = VocabParallelHead(weight, bias, [len(block) for block in plan.vocab], comm)
        self.num_bytes = self._logits.num_bytes

    def __call__(self, x: Tensor, delta: Tensor | None, view: StepView) -> Tensor | None:
        if view.sampled_tokens.numel() == 0:
            return None
        x = x[view.sampled_tokens]
        delta = None if delta is None else delta[view.sampled_tokens]
        if self._norm is not None:
            x = self._ops.add_norm(self._norm, x, delta)[1]
        elif delta is not None:
            x = x + delta
        if self._projection is not None:
            x = F.linear(x, self._projection)
        logits = self._logits(x)
        if logits is None or (self._spec.scale == 1.0 and self._spec.softcap is None):
            return logits
        logits = logits * self._spec.scale
        return logits if self._spec.softcap is None else self._spec.softcap * torch.tanh(logits / self._spec.softcap)


def _to(device: torch.device, parameters: Parameters) -> Parameters:
    return {name: tensor.to(device) for name, tensor in parameters.items()}
