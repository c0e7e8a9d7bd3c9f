"""One rank's part of a model: the layers of its stage, its heads and columns of each, and the ends that it has.

Tokens of prompts that an encoder reads travel behind the others of a step, through all stages: a decoder's layers make
of them the keys and values for their cross-attention, and hand them on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import VocabParallelHead, is_packed
from shardray.parallel.plan import ShardPlan
from shardray.parallel.rows import take_rows
from shardray.parallel.workspace import Workspace
from shardray.runtime.model.attention import KVPages, OwnHeads, PromptsView, StepView
from shardray.runtime.model.blocks import DecoderLayer
from shardray.runtime.model.embedding import TokenEmbedding
from shardray.runtime.model.kernels.ops import NormWeights, Ops
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.mlp import OwnExperts
from shardray.runtime.model.spec import DecoderSpec, Pooling
from shardray.runtime.model.stack import EncoderStack, LayerStack
from shardray.runtime.model.weights import Parameters, below, weight_of

Progress = Callable[[float], None]


class ShardedDecoder:
    """Loads and runs one rank's part: token ids or hidden states in, hidden states, logits or embeddings out.

    ``num_bytes``: of its weights, as they are held.
    """

    def __init__(
        self, spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int, comm: Comm, ops: Ops,
        loader: ParameterLoader, device: torch.device, max_positions: int, encoder_pages: KVPages | None = None,
        suppressed_ids: Sequence[int] = (), progress: Progress = lambda fraction: None,
    ) -> None:  # fmt: skip
        """``encoder_pages``: of one layer, with room for all tokens of a step; where the model has an encoder.

        ``suppressed_ids``: tokens whose logits are minus infinity.
        """
        self._ops = ops
        self._workspace = Workspace()  # of what all layers read
        of_embedding = loader.embedding() if stage == 0 else {}
        self.embeddings = _Embeddings(spec, plan, tp_rank, comm, of_embedding) if stage == 0 else None
        layers, blocks = plan.stages[stage], []
        for index in layers:
            parameters = loader.layer(index)
            layer = spec.all_layers[index]
            blocks.append(
                DecoderLayer(
                    layer, OwnHeads.of(plan, tp_rank), OwnExperts.of(layer.mlp, plan, tp_rank), parameters, comm, ops
                )
            )
            progress((index - layers.start + 1) / len(layers))
        self._experts = [block.experts for block in blocks if block.experts is not None]
        num_encoding = max(0, min(layers.stop, spec.num_encoder_layers) - layers.start)
        self.encoder: EncoderStack | None = None
        if num_encoding:
            assert spec.encoder is not None
            assert encoder_pages is not None
            norm = None
            if spec.num_encoder_layers in range(layers.start, layers.stop + 1) and spec.encoder.norm is not None:
                norm = NormWeights.of(spec.encoder.norm, "encoder.final_norm", loader.encoder_end())
            self.encoder = EncoderStack(blocks[:num_encoding], norm, spec.encoder.max_positions, encoder_pages, device)
        self.layers = LayerStack(blocks[num_encoding:], max_positions, device)
        self.head: _Head | _Pooler | None = None
        copied: list[Tensor] = []
        if stage == plan.pp_size - 1 and spec.layers:
            of_head = loader.head()
            if spec.head.tied and stage == 0 and is_packed(device.type, of_head["head.weight"].dtype):
                copied = [of_head["head.weight"]]
            self.head = _Head(spec, plan, comm, ops, of_head, suppressed_ids)
        elif stage == plan.pp_size - 1:
            self.head = _Pooler()
        self.num_bytes = loader.num_bytes + sum(tensor.nbytes for tensor in copied)

    def __call__(self, x: Tensor | None, pages: KVPages, view: StepView) -> Tensor | None:
        """Hidden states of the stage before (None on the first) to hidden states (T, H), or on the last stage this
        rank's logits (S, v) float32 of ``view.sampled_tokens``, None where there are none. An encoder alone gives the
        embeddings of its prompts instead, (P, H) float32."""
        self._workspace.new_turn()
        with self._workspace.active():
            if self.embeddings is not None:
                x = self.embeddings(view)
            angles = self.layers.angles(view.positions)
        assert x is not None
        prompts, num_own = view.prompts, view.token_ids.shape[0]
        x, encoded = (x, None) if x.shape[0] == num_own else (x[:num_own], x[num_own:])
        if encoded is not None:
            assert prompts is not None
            encoded = self._encode(encoded, pages, prompts)
        x, delta = self.layers(x, pages, view, angles) if num_own else (x, None)
        if isinstance(self.head, _Pooler):
            return self.head(encoded, prompts)
        if self.head is not None:
            return self.head(x, delta, view)
        # The next step may write over what the layers gave.
        x = x.clone() if delta is None else self._ops.add(x, delta)
        return x if encoded is None else torch.cat((x, encoded))

    def best(self, logits: Tensor) -> Tensor:
        """Of this rank's logits (S, v), and those of the other tensor ranks, each row's best token: (S,) int64."""
        assert isinstance(self.head, _Head)
        return self.head.logits.best(logits)

    def gather(self, logits: Tensor) -> Tensor | None:
        """All logits (S, V) on tensor rank 0, None on the others."""
        assert isinstance(self.head, _Head)
        return self.head.logits.gather(logits)

    def expert_imbalance(self) -> float:
        """Tokens of the busiest expert over the mean of all, lately; the mean over layers. 0 without experts."""
        loads = [experts.load for experts in self._experts]
        found = [float(load.max() / load.mean()) for load in loads if load.any()]
        return sum(found) / len(found) if found else 0.0

    def _encode(self, encoded: Tensor, pages: KVPages, prompts: PromptsView) -> Tensor:
        """Take prompts through the layers of the encoder, and show those of the decoder what comes out."""
        assert prompts.encoded is not None
        if self.encoder is not None:
            encoded = self.encoder(encoded, prompts.encoded)
        self.layers.remember(encoded, pages, prompts)
        return encoded


class _Embeddings:
    """Of the tokens of a step: first the decoder's, then the encoder's."""

    def __init__(self, spec: DecoderSpec, plan: ShardPlan, tp_rank: int, comm: Comm, parameters: Parameters) -> None:
        first_row = plan.vocab[tp_rank].start
        self._own: TokenEmbedding | None = None
        self._encoded: TokenEmbedding | None = None
        if spec.layers:
            self._own = TokenEmbedding(spec.embedding, first_row, comm, parameters)
        if spec.encoder is not None:
            of_encoder = below("encoder.", parameters)
            if spec.encoder.shares_tokens:
                of_encoder = {**of_encoder, "embed.weight": parameters["embed.weight"]}
            self._encoded = TokenEmbedding(spec.encoder.embedding, first_row, comm, of_encoder)

    def __call__(self, view: StepView) -> Tensor:
        """(T, H), every prompt that is read included"""
        encoded = None if view.prompts is None else view.prompts.encoded
        parts = []
        if self._own is not None and view.token_ids.shape[0]:
            parts.append(self._own(view.token_ids, view.positions))
        if self._encoded is not None and encoded is not None:
            parts.append(self._encoded(encoded.token_ids, encoded.positions))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Head:
    def __init__(
        self, spec: DecoderSpec, plan: ShardPlan, comm: Comm, ops: Ops, parameters: Parameters,
        suppressed_ids: Sequence[int],
    ) -> None:  # fmt: skip
        self._ops = ops
        self._spec = spec.head
        self._norm = None if spec.head.norm is None else NormWeights.of(spec.head.norm, "final_norm", parameters)
        self._projection = parameters.get("head_projection.weight")
        weights = weight_of(parameters, "head"), parameters.get("head.bias")
        self.logits = VocabParallelHead(*weights, [len(block) for block in plan.vocab], comm)
        own = plan.vocab[comm.rank]
        columns = [token_id - own.start for token_id in suppressed_ids if token_id in own]
        self._suppressed = torch.tensor(columns, dtype=torch.int64, device=self.logits.device)
        self._workspace = Workspace()

    def __call__(self, x: Tensor, delta: Tensor | None, view: StepView) -> Tensor | None:
        if view.sampled_tokens.numel() == 0:
            return None
        self._workspace.new_turn()
        with self._workspace.active():
            logits = self._logits(x, delta, view.sampled_tokens)
        if self._spec.scale != 1.0:
            logits = logits * self._spec.scale
        if self._spec.softcap is not None:
            logits = self._spec.softcap * torch.tanh(logits / self._spec.softcap)
        return logits.index_fill_(1, self._suppressed, -torch.inf) if self._suppressed.numel() else logits

    def _logits(self, x: Tensor, delta: Tensor | None, sampled_tokens: Tensor) -> Tensor:
        x = take_rows(x, sampled_tokens)
        delta = None if delta is None else take_rows(delta, sampled_tokens)
        if self._norm is not None:
            x = self._ops.add_norm(self._norm, x, delta)[1]
        elif delta is not None:
            x = x + delta
        if self._projection is not None:
            x = F.linear(x, self._projection)
        return self.logits(x)


class _Pooler:
    """From the hidden states of whole prompts to their embeddings."""

    def __call__(self, encoded: Tensor | None, prompts: PromptsView | None) -> Tensor:
        assert encoded is not None
        assert prompts is not None
        assert prompts.encoded is not None
        rows = zip(prompts.encoded.prefills, prompts.pooled, strict=True)
        return torch.stack([_pool(encoded[row.first : row.first + row.num_tokens], how) for row, how in rows])


def _pool(hidden: Tensor, pooling: Pooling) -> Tensor:
    """(S, H) of one text -> (H,) float32"""
    if pooling.mode == "mean":
        embedding = hidden.float().mean(dim=0)
    else:
        embedding = hidden[0 if pooling.mode == "cls" else -1].float()
    return F.normalize(embedding, dim=0) if pooling.normalize else embedding
