"""What one step costs a rank: the arithmetic that it does, the bytes that it reads, and those that it sends.

Pure arithmetic over the spec and the plan; the formulas:

    products     2 FLOPs a parameter and token: a multiplication and an addition. Each parameter is read once a step.
    experts      a token meets k of E; a step of T tokens meets E (1 - (1 - k/E)^T) of them, if they are chosen evenly
    attention    4 d FLOPs a query head and token that it sees: q·k and weight·v (arXiv 2205.14135, section 3.1).
                 Keys and values that are seen are read once a step: 2 d elements a KV head and token
    a sum over n ranks in a ring     2 (n - 1) messages, of 1/n of the tensor each (Thakur, Rabenseifner and Gropp,
                 "Optimization of Collective Communication Operations in MPICH", 2005, section 4.5)
    sums of a layer                  after attention and after the MLP (arXiv 1909.08053, section 3)
    the best token                   n - 1 messages of every rank to the others: a score and a column a sequence
    activations  what a product makes is written, and read by what comes next: 2 elements an output and token. Norms,
                 rotary and gates are that: they do little else than read and write
    the head     as products, for the tokens that are sampled: one a sequence, even of a long prompt

Left out, for being small beside these: drawing tokens, one row of the embedding a token. Where more of the logits
matters than the highest, they are gathered besides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardray.parallel.plan import Axis, ShardPlan
from shardray.runtime.model.parameters import CROSS, Parameter, head_parameters, kind_parameters
from shardray.runtime.model.spec import Attention, DecoderSpec, Experts, Layer

_FLOAT32_BYTES = 4
_BEST_BYTES = 16  # score and column travel as float64


@dataclass(frozen=True)
class StepLoad:
    """``num_seqs`` sequences of ``context_len`` tokens each, to which a step adds ``num_new`` a sequence.

    ``prompt_len``: tokens of each that an encoder has read. ``is_encoding``: the new ones are for the encoder to read.
    """

    num_seqs: int
    num_new: int
    context_len: int
    prompt_len: int = 0
    is_encoding: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.num_new


@dataclass(frozen=True)
class Work:
    """Arithmetic and the bytes that have to be read for it."""

    flops: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)

    def __rmul__(self, count: int) -> Work:
        return Work(count * self.flops, count * self.num_bytes)


@dataclass(frozen=True)
class Traffic:
    """What one rank sends: messages one after the other, and bytes in all."""

    num_messages: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_messages + other.num_messages, self.num_bytes + other.num_bytes)


@dataclass(frozen=True)
class StepCost:
    """One rank's part of one step. What lacks arithmetic in it and what lacks bytes are apart."""

    products: Work  # of the layers
    head: Work
    attention: Work
    activation_bytes: float
    num_layers: int
    tensor: Traffic  # to the other ranks of its stage
    pipeline: Traffic  # to the next stage

    @property
    def work(self) -> Work:
        """All of it."""
        return self.products + self.head + self.attention + Work(0.0, self.activation_bytes)


def step_cost(
    spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int, load: StepLoad, item_bytes: int
) -> StepCost:
    """``item_bytes``: of one weight or activation."""
    products, head, attention, activation_bytes = Work(), Work(), Work(), 0.0
    kinds = _layer_kinds(spec, plan.stages[stage], load.is_encoding)
    layers = [spec.all_layers[kind] for kind in kinds]
    for kind, count in Counter(kinds).items():  # most are alike
        layer = spec.all_layers[kind]
        products += count * _layer_products(spec, kind, plan, tp_rank, load, item_bytes)
        attention += count * _attention_work(layer, plan, tp_rank, load, item_bytes)
        activation_bytes += count * 2 * item_bytes * load.num_tokens * _outputs_of_token(spec, kind, plan, tp_rank)
    makes_logits = stage == plan.pp_size - 1 and not load.is_encoding
    if makes_logits:
        weight = head_parameters(spec)["head.weight"]
        size = weight.num_owned(plan, tp_rank)
        head = Work(2.0 * size * load.num_seqs, size * weight.item_bytes(item_bytes))
    hidden_bytes = load.num_tokens * spec.hidden_size * item_bytes
    tensor = _layer_sums(layers, plan, load, hidden_bytes) + _end_traffic(plan, stage, makes_logits, load, hidden_bytes)
    hands_over = Traffic(1, hidden_bytes) if stage < plan.pp_size - 1 else Traffic()
    return StepCost(products, head, attention, activation_bytes, len(kinds), tensor, hands_over)


def _layer_kinds(spec: DecoderSpec, stage: range, is_encoding: bool) -> list[int]:
    """Of the encoder's layers, or of the decoder's."""
    return [spec.layer_kinds[i] for i in stage if (i < spec.num_encoder_layers) == is_encoding]


def ring_sum(num_ranks: int, num_bytes: float) -> Traffic:
    """What each of ``num_ranks`` sends to sum a tensor of ``num_bytes``."""
    hops = 2 * (num_ranks - 1)
    return Traffic(hops, hops * num_bytes / num_ranks)


def share_of_experts(experts: Experts, num_tokens: int) -> float:
    """Of all experts, the share that ``num_tokens`` tokens are expected to meet."""
    return 1.0 - (1.0 - experts.top_k / experts.num_experts) ** num_tokens


def seen_tokens(attention: Attention, num_new: int, context_len: int) -> float:
    """Tokens that the new ones of a sequence see, added up over them; each sees itself and what stands before it."""
    if not attention.causal:
        return float(num_new * _within_window(attention, context_len + num_new))
    window = attention.window or context_len + num_new
    first, last = context_len + 1, context_len + num_new
    growing = max(0, min(last, window) - first + 1)  # of them, those that still see everything
    return growing * (2 * first + growing - 1) / 2 + (num_new - growing) * window


def _within_window(attention: Attention, num_tokens: int) -> int:
    if attention.window is None:
        return num_tokens
    return min(num_tokens, attention.window if attention.causal else 2 * attention.window - 1)


def _attention_work(layer: Layer, plan: ShardPlan, tp_rank: int, load: StepLoad, item_bytes: int) -> Work:
    attention, num_seqs = layer.attention, load.num_seqs
    seen = num_seqs * seen_tokens(attention, load.num_new, load.context_len)
    read = load.context_len + load.num_new
    if attention.window is not None:
        read = min(read, attention.window + load.num_new - 1)
    if layer.cross is not None:
        seen += load.num_tokens * load.prompt_len
        read += load.prompt_len
    num_heads, num_kv_heads, dim = len(plan.heads[tp_rank]), len(plan.kv_heads[tp_rank]), attention.head_dim
    return Work(4.0 * dim * num_heads * seen, 2.0 * dim * num_kv_heads * item_bytes * num_seqs * read)


def _layer_products(
    spec: DecoderSpec, kind: int, plan: ShardPlan, tp_rank: int, load: StepLoad, item_bytes: int
) -> Work:
    total, layer = Work(), spec.all_layers[kind]
    for parameter in matrices(kind_parameters(spec, kind)):
        size = parameter.num_owned(plan, tp_rank)
        met, read = _share_met(layer, parameter), 1.0
        if met < 1.0:
            assert isinstance(layer.mlp, Experts)
            read = share_of_experts(layer.mlp, load.num_tokens)
        total += Work(2.0 * size * met * load.num_tokens, size * read * parameter.item_bytes(item_bytes))
    return total


def _outputs_of_token(spec: DecoderSpec, kind: int, plan: ShardPlan, tp_rank: int) -> float:
    """Elements that the products of a layer make for one token."""
    total, layer = 0.0, spec.all_layers[kind]
    for parameter in matrices(kind_parameters(spec, kind)):
        sizes = [part.stop - part.start for part in parameter.owned(plan, tp_rank)]
        total += math.prod(sizes[:-1]) * _share_met(layer, parameter)
    return total


def _share_met(layer: Layer, parameter: Parameter) -> float:
    """Of a matrix, or of the matrices of all experts, the share that one token is multiplied with."""
    if not any(split.axis is Axis.EXPERTS for split in parameter.splits):
        return 1.0
    assert isinstance(layer.mlp, Experts)
    return layer.mlp.top_k / layer.mlp.num_experts


def matrices(parameters: Mapping[str, Parameter]) -> Iterator[Parameter]:
    """What every token is multiplied with. Keys and values of cross-attention are made once a prompt: left out."""
    others = (f"{CROSS}k.", f"{CROSS}v.", f"{CROSS}relative.", "relative.", "q_norm.", "k_norm.")
    for name, parameter in parameters.items():
        if name.endswith("weight") and len(parameter.shape) > 1 and not name.startswith(others):
            yield parameter


def _layer_sums(layers: list[Layer], plan: ShardPlan, load: StepLoad, hidden_bytes: int) -> Traffic:
    total = Traffic()
    for layer in layers if plan.tp_size > 1 else ():
        for _ in range(2 + (layer.cross is not None)):
            total += ring_sum(plan.tp_size, hidden_bytes)
        if layer.attention.norm_over == "all" and layer.attention.q_norm is not None:
            total += ring_sum(plan.tp_size, 2 * _FLOAT32_BYTES * load.num_tokens)
    return total


def _end_traffic(plan: ShardPlan, stage: int, makes_logits: bool, load: StepLoad, hidden_bytes: int) -> Traffic:
    """The sum of the embedding on the first stage, and the best tokens on the last."""
    total, others = Traffic(), plan.tp_size - 1
    if others and stage == 0:
        total += ring_sum(plan.tp_size, hidden_bytes)
    if others and makes_logits:
        total += Traffic(others, others * load.num_seqs * _BEST_BYTES)
    return total
