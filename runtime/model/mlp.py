"""The MLPs of a layer: one, or many experts of which a router chooses some for each token.

Legend: T tokens of the step, H hidden size, k experts of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardray.parallel.comm import Comm
from shardray.parallel.layers import ColumnParallelLinear, Linear
from shardray.parallel.plan import Axis, ShardPlan
from shardray.runtime.model.kernels.ops import Ops
from shardray.runtime.model.spec import Experts, Groups, Mlp
from shardray.runtime.model.weights import Parameters, below, weight_of

_MEMORY = 0.99  # how much of an expert's load is left in the next step


class OwnExperts(NamedTuple):
    """Which experts of a layer a rank has: from the first one on, whole or a part of each."""

    first: int = 0
    are_whole: bool = False

    @classmethod
    def of(cls, mlp: Mlp | Experts, plan: ShardPlan, tp_rank: int) -> OwnExperts:
        if isinstance(mlp, Mlp):
            return cls()
        return cls(plan.owned(Axis.EXPERTS, tp_rank, mlp.num_experts).start, plan.expert_parallel)


class MlpPart:
    """A rank's part of an MLP, gated or not; gate and up in one product. Its results are still to be summed."""

    def __init__(self, mlp: Mlp, parameters: Parameters, adds_bias: bool, ops: Ops) -> None:
        if mlp.interleaved:
            parameters = {**parameters, **_in_halves(parameters)}
        names = ("gate", "up") if mlp.gated else ("up",)
        biases = [parameters[f"{name}.bias"] for name in names] if mlp.up_bias else None
        self._ops = ops
        self._mlp = mlp
        self._in = ColumnParallelLinear.merged([weight_of(parameters, name) for name in names], biases)
        self._out = Linear(weight_of(parameters, "down"), parameters.get("down.bias") if adds_bias else None)

    def __call__(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)"""
        return self._out(self._ops.activate(self._in(x), self._mlp.activation, self._mlp.gated))


class MlpBlock:
    """An MLP, summed over ranks."""

    def __init__(self, mlp: Mlp, parameters: Parameters, comm: Comm, ops: Ops) -> None:
        self._part = MlpPart(mlp, parameters, comm.rank == 0, ops)
        self._comm = comm

    def __call__(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)"""
        return self._comm.all_reduce(self._part(x))


class ExpertsBlock:
    """The experts, or parts of them, that this rank has; summed over ranks. Every rank routes every token.

    ``load``: (experts,) tokens of each, those of older steps counting less and less.
    """

    def __init__(self, experts: Experts, own: OwnExperts, parameters: Parameters, comm: Comm, ops: Ops) -> None:
        self._spec = experts
        self._comm = comm
        self._router = parameters["router.weight"]
        self._router_bias, self._correction = parameters.get("router.bias"), parameters.get("router.correction")
        adds_bias = own.are_whole or comm.rank == 0
        stacked, shared = below("experts.", parameters), below("shared.", parameters)
        self._experts = {
            own.first + i: MlpPart(experts.mlp, {name: tensor[i] for name, tensor in stacked.items()}, adds_bias, ops)
            for i in range(stacked["down.weight"].shape[0])
        }
        self._shared = None if experts.shared is None else MlpPart(experts.shared, shared, comm.rank == 0, ops)
        self._shared_gate = parameters.get("shared_gate.weight")
        self.load = torch.zeros(experts.num_experts, device=self._router.device)

    def __call__(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)"""
        weights, chosen = self._route(x)
        self.load = _MEMORY * self.load + torch.bincount(chosen.flatten(), minlength=self._spec.num_experts)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for index, expert in self._experts.items():
            rows, places = torch.nonzero(chosen == index, as_tuple=True)
            if rows.numel():
                total.index_add_(0, rows, expert(x[rows]).float() * weights[rows, places, None])
        if self._shared is not None:
            shared = self._shared(x).float()
            if self._shared_gate is not None:
                shared *= torch.sigmoid(F.linear(x, self._shared_gate).float())
            total += shared
        return self._comm.all_reduce(total.to(x.dtype))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, k) float32 weights, and the experts that they belong to"""
        router = self._router
        if self._spec.routes_in_float32:
            x, router = x.float(), router.float()  # a copy for the step is cheap beside the experts
        logits = F.linear(x, router, self._router_bias).float()
        scores = torch.sigmoid(logits) if self._spec.scores == "sigmoid" else torch.softmax(logits, dim=-1)
        choice = scores if self._correction is None else scores + self._correction
        if self._spec.groups is not None:
            choice = _of_best_groups(choice, self._spec.groups)
        chosen = torch.topk(choice, self._spec.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self._spec.normalized:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self._spec.scale, chosen


def _in_halves(parameters: Parameters) -> Parameters:
    """Gate and up out of the matrix in which their rows take turns"""
    fused = below("gate_up.", parameters)
    return {
        f"{name}.{part}": rows[place::2] for place, name in enumerate(("gate", "up")) for part, rows in fused.items()
    }


def _of_best_groups(scores: Tensor, groups: Groups) -> Tensor:
    """(T, experts), those of other groups at minus infinity"""
    by_group = scores.view(scores.shape[0], groups.num_groups, -1)
    ranks = by_group.topk(groups.judges, dim=-1).values.sum(dim=-1)
    best = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, ranks.topk(groups.top_k, dim=-1).indices, True)
    return by_group.masked_fill(~best[..., None], -torch.inf).flatten(-2)


def mlp_block(
    mlp: Mlp | Experts, own: OwnExperts, parameters: Parameters, comm: Comm, ops: Ops
) -> MlpBlock | ExpertsBlock:
    if isinstance(mlp, Mlp):
        return MlpBlock(mlp, parameters, comm, ops)
    return ExpertsBlock(mlp, own, parameters, comm, ops)
