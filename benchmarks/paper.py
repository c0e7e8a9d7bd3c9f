"""The tables of docs/scaling.md: what meshes of 8 and 64 GPUs cost and can reach, on paper.

Everything is computed by the functions behind ``shardray plan`` (``runtime/model/costs.py``,
``runtime/engine/forecast.py``, ``runtime/engine/sizing.py``), so that the page cannot part from them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.compare import table
from shardray.runtime.engine.forecast import decode_round_s, prompt_steps, stage_times_s, through_stages_s
from shardray.runtime.engine.hardware import Hardware
from shardray.runtime.engine.served import ServedSpec, read_served
from shardray.runtime.engine.shapes import cut
from shardray.runtime.engine.sizing import HostMemory, plan_mesh
from shardray.runtime.model.costs import StepLoad, step_cost

SCALING_PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
_GPUS_A_NODE = 8
_BEGIN, _END = "<!-- {name}: python -m benchmarks paper --write -->", "<!-- end of {name} -->"
_CONTEXT_LEN, _PROMPT_LEN = 2048, 2048
# What kernels reach of an H100's data sheet (3.35 TB/s, 989 TFLOP/s), and what its links carry one way.
_MEMORY_BYTES_PER_S, _FLOPS_PER_S = 0.85 * 3.35e12, 0.65 * 989e12
NVLINK = Hardware.of(_MEMORY_BYTES_PER_S, _FLOPS_PER_S, link_bytes_per_s=450e9, message_s=1e-6)
NETWORK = Hardware.of(_MEMORY_BYTES_PER_S, _FLOPS_PER_S, link_bytes_per_s=50e9, message_s=5e-6)
_GPU_MEMORY = HostMemory("cuda", 80 << 30, is_shared=False, is_packed=False, memory_utilization=0.9)
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # of Llama 3.1


@dataclass(frozen=True)
class Shape:
    """Tensor ranks × pipeline stages × replicas."""

    tp_size: int
    pp_size: int
    replicas: int = 1

    def __str__(self) -> str:
        return f"{self.tp_size} × {self.pp_size} × {self.replicas}"

    @property
    def tensor_link(self) -> Hardware:
        return NVLINK if self.tp_size <= _GPUS_A_NODE else NETWORK

    @property
    def pipeline_link(self) -> Hardware:
        return NVLINK if self.tp_size * self.pp_size <= _GPUS_A_NODE else NETWORK


SHAPES_OF_8 = (Shape(1, 1, 8), Shape(2, 1, 4), Shape(4, 1, 2), Shape(8, 1), Shape(4, 2), Shape(2, 4), Shape(1, 8))
SHAPES_OF_64 = (
    Shape(4, 1, 16),
    Shape(8, 1, 8),
    Shape(4, 2, 8),
    Shape(8, 2, 4),
    Shape(8, 8),
    Shape(16, 4),
    Shape(64, 1),
)


@cache
def served(model: str) -> ServedSpec:
    """What ``shardray plan`` reads of a model's folder."""
    bounds = SimpleNamespace(max_num_seqs=2048, max_num_batched_tokens=2048, block_size=16)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_LLAMA | MODELS[model]))
        return read_served(Path(folder), "bfloat16", None, bounds)


def traffic_table() -> str:
    """What the busiest rank sends for a decode token, by way of cutting."""
    rows = [["model", "cut", "messages a step and layer", "bytes a token and layer", "messages take a step, NVLink",
             "bytes of 32 tokens take", "messages take, 400 Gb/s", "bytes of 32 tokens take"]]  # fmt: skip
    for model in MODELS:
        for tp_size, pp_size in ((2, 1), (4, 1), (8, 1), (16, 1), (64, 1), (1, 8), (1, 16)):
            rows.append([model, _cut_name(tp_size, pp_size), *_traffic_cells(model, tp_size, pp_size)])
    return table(rows)


def _traffic_cells(model: str, tp_size: int, pp_size: int) -> list[str]:
    known, num_seqs = served(model), 32
    plan = cut(known.spec, tp_size, pp_size, False)
    cost = step_cost(known.spec, plan, 0, 0, StepLoad(num_seqs, 1, _CONTEXT_LEN), known.dtype.itemsize)
    sent = cost.tensor + cost.pipeline
    num_layers = len(plan.stages[0])
    cells = [f"{sent.num_messages / num_layers:.3g}", f"{sent.num_bytes / num_seqs / num_layers:,.0f}"]
    hops = max(1, pp_size - 1)  # one stage after the other hands over
    for link in (NVLINK, NETWORK):
        cells += [_time(hops * sent.num_messages * link.message_s)]
        cells += [_time(hops * sent.num_bytes / link.link_bytes_per_s)]
    return cells


def shapes_table(model: str, shapes: tuple[Shape, ...], batch_sizes: tuple[int, ...]) -> str:
    """What each shape can reach at most; ``batch_sizes`` are of all replicas together."""
    decodes = [f"{num_seqs} streams, tokens/s" for num_seqs in batch_sizes]
    head = ["tensor × pipeline × replicas", "weights of a GPU, GiB", "KV tokens of all", "one stream, tokens/s"]
    rows = [[*head, *decodes, f"first token of {_PROMPT_LEN:,}, ms"]]
    for shape in shapes:
        known = served(model)
        mesh = plan_mesh(known, cut(known.spec, shape.tp_size, shape.pp_size, False), _GPU_MEMORY, shape.replicas)
        weights = max(host.memory.weight_bytes for host in mesh.hosts) / 2**30
        if not mesh.fits:
            rows.append([str(shape), f"{weights:.1f}", "does not fit", *["–"] * (len(batch_sizes) + 2)])
            continue
        fitting = mesh.num_sequences(_CONTEXT_LEN + 1)
        one, rates = decode_rate(model, shape, 1), [_batch_cell(model, shape, n, fitting) for n in batch_sizes]
        first = f"{1e3 * first_token_s(model, shape):.0f}"
        kv_tokens = f"{shape.replicas * mesh.num_kv_tokens:,}"
        rows.append([str(shape), f"{weights:.1f}", kv_tokens, f"{one:.0f}", *rates, first])
    return table(rows)


def _batch_cell(model: str, shape: Shape, num_seqs: int, fitting: int) -> str:
    """``fitting``: sequences that the pages of a replica hold at once."""
    of_one = min(-(-num_seqs // shape.replicas), fitting)
    rate = f"{shape.replicas * decode_rate(model, shape, of_one):,.0f}"
    return rate if of_one * shape.replicas >= num_seqs else f"{rate} ({of_one * shape.replicas} at once)"


def decode_rate(model: str, shape: Shape, num_seqs: int) -> float:
    """Of one replica: as ``forecast.decode_tokens_per_s``, with a link of its own for what stages hand over."""
    num_lanes = min(shape.pp_size, num_seqs)
    times = stage_times(model, shape, StepLoad(-(-num_seqs // num_lanes), 1, _CONTEXT_LEN))
    return num_seqs / decode_round_s(times, num_lanes)


def first_token_s(model: str, shape: Shape) -> float:
    """Of one prompt alone."""
    loads = prompt_steps(served(model), _PROMPT_LEN, shape.pp_size)
    return through_stages_s([stage_times(model, shape, load) for load in loads])


def stage_times(model: str, shape: Shape, load: StepLoad) -> list[tuple[float, float]]:
    """(computing and sums, handing over) of each stage; links differ inside and between nodes."""
    known = served(model)
    plan = cut(known.spec, shape.tp_size, shape.pp_size, False)
    inside = stage_times_s(known, plan, load, shape.tensor_link)
    between = stage_times_s(known, plan, load, shape.pipeline_link)
    return [(computing_s, handing_s) for (computing_s, _), (_, handing_s) in zip(inside, between, strict=True)]


def tables() -> dict[str, str]:
    """By name; docs/scaling.md has each between two marks."""
    return {
        "traffic": traffic_table(),
        "8 GPUs, 8B": shapes_table("8B", SHAPES_OF_8, (32, 256)),
        "8 GPUs, 70B": shapes_table("70B", SHAPES_OF_8, (32, 256)),
        "64 GPUs, 70B": shapes_table("70B", SHAPES_OF_64, (256, 2048)),
    }


def with_tables(text: str) -> str:
    """A document with the tables of today between its marks. Raises ValueError for marks that are missing."""
    for name, content in tables().items():
        begin, end = _BEGIN.format(name=name), _END.format(name=name)
        if begin not in text or end not in text:
            raise ValueError(f"the document lacks the marks {begin} and {end}")
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def _cut_name(tp_size: int, pp_size: int) -> str:
    return f"tensor {tp_size}" if pp_size == 1 else f"pipeline {pp_size}"


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} µs"
