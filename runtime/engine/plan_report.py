"""What ``shardray plan`` finds out, as data: for its tables, and as JSON."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.layers import is_packed
from shardray.runtime.config import Config
from shardray.runtime.engine.forecast import TokenCost, decode_cost, prompt_cost
from shardray.runtime.engine.hardware import USUAL_LINK_BYTES_PER_S, USUAL_MESSAGE_S, Hardware
from shardray.runtime.engine.memory import available_bytes
from shardray.runtime.engine.obstacles import remedies, shortage
from shardray.runtime.engine.served import ServedSpec, read_served
from shardray.runtime.engine.shapes import cut, cut_as_configured
from shardray.runtime.engine.shared_weights import shares
from shardray.runtime.engine.sizing import Candidate, HostMemory, Load, PlannedHost, candidates, try_shape
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.parameters import num_owned_bytes, num_owned_elements
from shardray.runtime.model.sources import read_headers
from shardray.runtime.model.spec import ModelConfigError

_USUAL_CONTEXT_LEN = 1024


@dataclass(frozen=True)
class Wishes:
    """What the command line says besides the file; None is what this machine or the model has."""

    num_hosts: int | None
    memory_bytes: int | None
    bytes_per_s: float | None
    flops_per_s: float | None
    link_bytes_per_s: float | None
    message_s: float | None
    num_seqs: int
    context_len: int | None
    prompt_len: int | None
    measures: bool = False  # how fast this machine is


@dataclass(frozen=True)
class Report:
    """``chosen`` is the shape of the file, or the best of ``shapes`` if a number of hosts was given."""

    model_id: str
    served: ServedSpec
    offer: HostMemory
    load: Load
    hardware: Hardware | None
    num_hosts: int
    chosen: Candidate
    shapes: list[Candidate]
    decode: TokenCost
    prompt: TokenCost
    obstacle: str | None
    remedies: list[str]

    @property
    def num_seqs(self) -> int:
        """That decode together in one replica of the chosen shape."""
        return max(1, self.chosen.num_seqs)


def make_report(config: Config, wishes: Wishes) -> Report:
    """Reads the headers of the model, or fetches them. Raises what is wrong with the file, the model or the wishes."""
    model, parallel = config.model, config.parallel
    _, served = open_model(config)
    plan = cut_as_configured(served.spec, parallel)
    offer, load = _offer(config, served, wishes), _load(served, wishes)
    num_hosts = wishes.num_hosts or parallel.num_hosts
    hardware = _measured(config, served, wishes, offer, num_hosts) if wishes.measures else _as_told(wishes)
    shapes = candidates(served, num_hosts, offer, load, hardware, parallel.expert_parallel)
    chosen = shapes[0] if wishes.num_hosts else try_shape(served, plan, parallel.replicas, offer, load, hardware)
    num_seqs, fits = max(1, chosen.num_seqs), chosen.mesh.fits
    return Report(
        model_id=model.source,
        served=served,
        offer=offer,
        load=load,
        hardware=hardware,
        num_hosts=num_hosts,
        chosen=chosen,
        shapes=shapes,
        decode=decode_cost(served, chosen.mesh.plan, num_seqs, load.context_len),
        prompt=prompt_cost(served, chosen.mesh.plan, load.prompt_len),
        obstacle=None if fits else shortage(chosen.mesh, offer),
        remedies=[] if fits else remedies(served, chosen.mesh, offer),
    )


def open_model(config: Config) -> tuple[Checkpoint, ServedSpec]:
    """The headers of a model that is whole, and that can be cut as configured. Raises ValueError of several kinds."""
    checkpoint = read_headers(config.model.source, revision=config.model.revision)
    served = read_served(checkpoint.folder, config.model.dtype, config.model.max_model_len, config.engine)
    plan = cut_as_configured(served.spec, config.parallel)
    ParameterLoader(checkpoint, served.family, served.spec, plan, 0, served.dtype)  # names what is missing
    return checkpoint, served


def _offer(config: Config, served: ServedSpec, wishes: Wishes) -> HostMemory:
    """Hosts are GPUs where the file or the wishes say so, or where this machine has some."""
    engine = config.engine
    is_gpu = engine.device == "cuda" or (
        engine.device == "auto" and (torch.cuda.is_available() or None not in (wishes.num_hosts, wishes.memory_bytes))
    )
    kind, num_bytes, is_shared = "cuda" if is_gpu else "cpu", wishes.memory_bytes, False
    if num_bytes is None and is_gpu:
        if not torch.cuda.is_available():
            raise ModelConfigError("engine.device: cuda: this machine has no GPU to ask; give --memory, 80GiB say")
        num_bytes = int(torch.cuda.mem_get_info()[1])
    elif num_bytes is None:
        num_bytes, is_shared = available_bytes(), True
    return HostMemory(
        kind, num_bytes, is_shared, is_packed(kind, served.dtype), engine.memory_utilization, engine.kv_memory_bytes,
        is_shared and shares(engine.share_weights, kind, served.dtype),
    )  # fmt: skip


def _load(served: ServedSpec, wishes: Wishes) -> Load:
    """What is wished for has to fit into the window."""
    longest = served.max_model_len if served.spec.layers else served.max_prompt_len
    context_len = wishes.context_len or min(_USUAL_CONTEXT_LEN, longest - 1)
    longest_prompt = served.max_prompt_len or longest
    prompt_len = wishes.prompt_len or min(context_len, longest_prompt)
    for option, value, most in (("--context", context_len, longest - 1), ("--prompt", prompt_len, longest_prompt)):
        if value > most:
            raise ModelConfigError(
                f"{option} {value}: there is room for {most} tokens (model.max_model_len); give fewer"
            )
    return Load(wishes.num_seqs, context_len, prompt_len)


def _as_told(wishes: Wishes) -> Hardware | None:
    if wishes.bytes_per_s is None or wishes.flops_per_s is None:
        return None
    message_s = USUAL_MESSAGE_S if wishes.message_s is None else wishes.message_s
    link_bytes_per_s = wishes.link_bytes_per_s or USUAL_LINK_BYTES_PER_S
    return Hardware.of(wishes.bytes_per_s, wishes.flops_per_s, link_bytes_per_s, message_s)


def _measured(config: Config, served: ServedSpec, wishes: Wishes, offer: HostMemory, num_hosts: int) -> Hardware:
    """Of hosts on this machine, or on machines like it. What the wishes say of the link stands."""
    from shardray.runtime.engine.measuring import measure_hardware

    if offer.device_type != "cpu":
        raise ModelConfigError(
            "--measure: times the kernels of CPUs, and engine.device is cuda; give --bandwidth and --compute instead"
        )
    on_machine = num_hosts if offer.is_shared else 1
    num_threads = config.engine.threads_per_host or max(1, len(os.sched_getaffinity(0)) // on_machine)
    found = measure_hardware(served, on_machine, num_threads)
    return dataclasses.replace(
        found,
        link_bytes_per_s=wishes.link_bytes_per_s or found.link_bytes_per_s,
        message_s=found.message_s if wishes.message_s is None else wishes.message_s,
    )


def to_jsonable(report: Report) -> dict[str, Any]:
    """Numbers as numbers, with units in names."""
    served, chosen = report.served, report.chosen
    return {
        "model": report.model_id,
        "dtype": served.dtype_name,
        "num_parameters": num_parameters(report),
        "weight_bytes": weight_bytes(report),
        "max_model_len": served.max_model_len,
        "fits": chosen.mesh.fits,
        "obstacle": report.obstacle,
        "remedies": report.remedies,
        "num_hosts": report.num_hosts,
        "host_memory_bytes": report.offer.num_bytes,
        "host_memory_is_shared": report.offer.is_shared,
        "device": report.offer.device_type,
        "load": dataclasses.asdict(report.load),
        "hardware": None if report.hardware is None else dataclasses.asdict(report.hardware),
        "hosts": [_host_to_jsonable(report, host) for host in chosen.mesh.hosts],
        "decode_token": dataclasses.asdict(report.decode) | {"num_seqs": report.num_seqs},
        "prompt_token": dataclasses.asdict(report.prompt),
        "chosen": _shape_to_jsonable(chosen),
        "shapes": [_shape_to_jsonable(shape) for shape in report.shapes],
    }


def num_parameters(report: Report) -> int:
    """Of the whole model, each counted once."""
    spec = report.served.spec
    return num_owned_elements(spec, cut(spec, 1, 1, expert_parallel=False), 0, 0)


def weight_bytes(report: Report) -> int:
    """What they take."""
    spec = report.served.spec
    return num_owned_bytes(spec, cut(spec, 1, 1, expert_parallel=False), 0, 0, report.served.item_bytes)


def _host_to_jsonable(report: Report, host: PlannedHost) -> dict[str, Any]:
    return {
        "rank": host.rank,
        "stage": host.stage,
        "tp_rank": host.tp_rank,
        "first_layer": host.layers.start,
        "num_layers": len(host.layers),
        "num_heads": host.num_heads,
        "num_kv_heads": host.num_kv_heads,
        "weight_bytes": host.memory.weight_bytes,
        "step_bytes": host.memory.step_bytes + host.memory.encoder_bytes,
        "runtime_bytes": host.runtime_bytes,
        "kv_bytes": report.chosen.mesh.kv_bytes(host),
        "missing_bytes": host.missing_bytes,
    }


def _shape_to_jsonable(shape: Candidate) -> dict[str, Any]:
    plan, mesh, rates = shape.mesh.plan, shape.mesh, shape.rates
    return {
        "tensor_parallel_size": plan.tp_size,
        "pipeline_parallel_size": plan.pp_size,
        "replicas": mesh.replicas,
        "fits": mesh.fits,
        "missing_bytes": mesh.tightest.missing_bytes,
        "num_kv_tokens": mesh.num_kv_tokens,
        "num_full_sequences": mesh.num_full_sequences,
        "rates": None
        if rates is None
        else dataclasses.asdict(rates) | {"fleet_decode_tokens_per_s": shape.decode_tokens_per_s},
    }
