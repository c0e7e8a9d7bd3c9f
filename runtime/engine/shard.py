"""One rank of a mesh, from its assignment to a running shard: groups opened, slices loaded, pages allocated.

The same call starts a fleet, replaces a lost host and changes the shard counts: nothing here is global to the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.credentials import Credentials
from shardray.parallel.exchange import choose_exchange
from shardray.parallel.filling import open_filling
from shardray.parallel.layers import Linear, is_packed
from shardray.parallel.mesh import Mesh, MeshSpec, Rendezvous, open_mesh
from shardray.parallel.plan import ShardPlan
from shardray.parallel.rows import prepare_rows
from shardray.parallel.spans import Spans
from shardray.runtime.engine.assignment import ShardAssignment, ShardInfo, ShardLoad
from shardray.runtime.engine.constraints import Constraints
from shardray.runtime.engine.device_memory import choose_num_pages, device_bytes, held_bytes
from shardray.runtime.engine.executor import MeshExecutor, serve_plans
from shardray.runtime.engine.limits import SchedulerLimits
from shardray.runtime.engine.loop import Engine
from shardray.runtime.engine.memory import MemoryGrant, num_encoder_pages, rank_memory, trim_heap
from shardray.runtime.engine.programs import StepPrograms, prepare_programs
from shardray.runtime.engine.race import prepare_draw
from shardray.runtime.engine.recorded import StepRecording
from shardray.runtime.engine.request import ServedModel
from shardray.runtime.engine.runner import ShardRunner
from shardray.runtime.engine.sampler import Sampler
from shardray.runtime.engine.served import ServedSpec, read_dtype, read_served, torch_dtype
from shardray.runtime.engine.shapes import cut_as_configured
from shardray.runtime.engine.shared_weights import keep_weights
from shardray.runtime.engine.slots import SlotTable
from shardray.runtime.model.attention import KVPages
from shardray.runtime.model.decoder import ShardedDecoder
from shardray.runtime.model.folder import read_eos_token_ids, read_suppressed_token_ids
from shardray.runtime.model.kernels import choose_ops, choose_recorder
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.parameters import num_cached_layers
from shardray.runtime.model.spec import ModelConfigError

__all__ = ["Rendezvous", "Shard", "form_shard", "open_rendezvous", "warm_up"]

Progress = Callable[[str, float], None]

_log = logging.getLogger(__name__)
_LOAD_TIMEOUT_S = 3600.0
# A step with so much of a prompt takes about three times as long as one that only reads the weights: three times the
# tokens at which products take longer than reading what they multiply, beside some decodes.
_PREFILL_BESIDE_DECODES = {"cpu": 64, "cuda": 512}
_DRAFTING_STEP = {"cpu": 16, "cuda": 128}  # tokens up to which a step takes little longer than for one
_LEAST_DRAFTING_STEP = 16  # where max_num_seqs is less: for the logits of so many tokens is memory reckoned


def open_rendezvous(bind_host: str, credentials: Credentials, size: int) -> Rendezvous:
    """Where the ``size`` ranks of a mesh meet; kept by the leader's process for as long as the mesh lives."""
    return Rendezvous(bind_host, credentials, size)


def warm_up(model_dir: str, dtype: str, device: str, num_threads: int) -> None:
    """Do what forming needs for any place in a mesh of this model: the device's context, the kernels' machine code.

    What is wrong with the model is for ``form_shard`` to tell.
    """
    try:
        kind = torch_dtype(read_dtype(dtype, Path(model_dir)))
    except (ModelConfigError, OSError) as error:
        _log.info("nothing to warm up for in %s: %s", model_dir, error)
        return
    torch.set_num_threads(1)  # see _use_cores
    choose_ops(torch.device(device), kind, num_threads)
    prepare_rows(torch.device(device))
    prepare_draw(torch.device(device))
    if choose_recorder(torch.device(device)) is not None:
        prepare_programs()
    Linear(torch.zeros(1, 2, dtype=kind, device=device))(torch.zeros(1, 2, dtype=kind, device=device))
    if device == "cpu":
        choose_exchange()


class _Lead(NamedTuple):
    """What the leader has beside its shard."""

    engine: Engine
    executor: MeshExecutor


@dataclass
class Shard:
    """A formed shard. The leader drives ``engine``; every other rank calls ``serve``."""

    assignment: ShardAssignment
    info: ShardInfo
    _mesh: Mesh
    _runner: ShardRunner
    _lead: _Lead | None  # on the leader only
    _num_borrowed_bytes: int  # of weights that another process loaded, and counts

    @property
    def engine(self) -> Engine:
        """The engine of the whole mesh; on the leader only."""
        if self._lead is None:
            raise RuntimeError(f"rank {self.assignment.rank} has no engine; the leader is rank 0")
        return self._lead.engine

    def serve(self) -> None:
        """Run the leader's plans until it says goodbye. Raises MeshError."""
        _use_cores(self.assignment)
        serve_plans(self._mesh, self._runner)

    def load(self) -> ShardLoad:
        """What it has done and holds. Thread-safe; asks nothing of the device, which may hang."""
        runner = self._runner
        memory_bytes = max(0, held_bytes(self._mesh.spec.device) - self._num_borrowed_bytes)
        return ShardLoad(num_steps=runner.num_steps, busy_s=runner.busy_s, memory_bytes=memory_bytes)

    def start_trace(self) -> None:
        """See ShardRunner."""
        self._runner.start_trace()

    def stop_trace(self) -> Spans:
        return self._runner.stop_trace()

    def abort(self) -> None:
        """Break off whatever this rank is blocked in. Thread-safe."""
        self._runner.forget_recorded()
        self._mesh.abort()
        if self._lead is not None:
            self._lead.engine.stop()

    def close(self) -> None:
        """Leave the mesh; memory, ports and groups are free afterwards."""
        if self._lead is not None:
            self._lead.executor.close()
        self._runner.forget_recorded()
        self._mesh.close()


def form_shard(
    assignment: ShardAssignment,
    progress: Progress = lambda doing, fraction: None,
    rendezvous: Rendezvous | None = None,
) -> Shard:
    """Take a place in a mesh; every rank of it calls this. ``rendezvous`` is the leader's, kept alive by its owner.

    Raises ModelConfigError, PlanError, CheckpointError or MemoryError for what cannot be served, MeshError for
    ranks that do not come.
    """
    _pin(assignment)
    torch.set_num_threads(1)  # see _use_cores
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what an earlier mesh of this process had is to be counted as free
    folder, device = Path(assignment.model_dir), torch.device(assignment.device)
    served, plan = read_plan(assignment)
    spec, dtype = served.spec, served.dtype
    progress("joining", 0.0)
    mesh = open_mesh(_mesh_spec(assignment), assignment.max_num_batched_tokens, spec.hidden_size, dtype)
    try:
        place = mesh.spec
        ops = choose_ops(device, dtype, assignment.num_threads)
        checkpoint = Checkpoint(folder)
        keeping = keep_weights(assignment, checkpoint, served, plan, progress)
        with open_filling(device) as filling, keeping as num_borrowed_bytes:
            loader = ParameterLoader(checkpoint, served.family, spec, plan, place.tp_rank, dtype, filling)
            decoder = ShardedDecoder(
                spec, plan, place.stage, place.tp_rank, mesh.tp, ops, loader, device, served.max_model_len,
                _encoder_pages(served, plan, place.tp_rank, device),
                read_suppressed_token_ids(Path(assignment.model_dir)),
                lambda fraction: progress("loading", fraction),
            )  # fmt: skip
        trim_heap()
        pages = _allocate_pages(assignment, served, plan, mesh)
        return _assemble(assignment, served, plan, mesh, decoder, pages, num_borrowed_bytes)
    except BaseException:
        mesh.close()
        raise


def read_plan(assignment: ShardAssignment) -> tuple[ServedSpec, ShardPlan]:
    """What is served, and how it is cut. Raises ModelConfigError or PlanError."""
    served = read_served(Path(assignment.model_dir), assignment.dtype, assignment.max_model_len, assignment)
    return served, cut_as_configured(served.spec, assignment)


def _assemble(
    assignment: ShardAssignment, served: ServedSpec, plan: ShardPlan, mesh: Mesh, decoder: ShardedDecoder,
    pages: KVPages, num_borrowed_bytes: int,
) -> Shard:  # fmt: skip
    place, device, spec = mesh.spec, mesh.spec.device, served.spec
    eos_token_ids = read_eos_token_ids(Path(assignment.model_dir))
    sampler: Sampler | None = None
    if place.stage == place.pp_size - 1 and place.tp_rank == 0:
        wait = partial(mesh.wait_for_device, operation="constraint")
        constraints = Constraints(Path(assignment.model_dir), spec.vocab_size, eos_token_ids, device, wait)
        sampler = Sampler(spec.vocab_size, eos_token_ids, device, assignment.num_threads, constraints)
    slots = SlotTable(
        served.max_num_seqs, served.max_model_len, served.block_size, device,
        None if served.encoder is None else served.max_prompt_len,
    )  # fmt: skip
    num_pages = pages.num_pages - _num_scratch_pages(assignment, served)
    limits = SchedulerLimits(
        max_num_seqs=served.max_num_seqs,
        max_num_batched_tokens=served.max_num_batched_tokens,
        max_prefill_beside_decodes=assignment.max_prefill_beside_decodes or _PREFILL_BESIDE_DECODES[device.type],
        max_model_len=served.max_model_len,
        block_size=served.block_size,
        num_pages=num_pages,
        max_draft_tokens=assignment.max_draft_tokens,
        max_drafting_step=min(_DRAFTING_STEP[device.type], max(_LEAST_DRAFTING_STEP, served.max_num_seqs)),
        prefix_caching=assignment.prefix_caching,
        max_in_flight=place.pp_size if place.pp_size > 1 else 2,
        lookahead=0 if place.pp_size > 1 else 1,
        eos_token_ids=frozenset(eos_token_ids),
        encoder=served.encoder,
    )
    layers = plan.stages[place.stage]
    info = ShardInfo(
        rank=place.rank,
        stage=place.stage,
        tp_rank=place.tp_rank,
        host=assignment.bind_host,
        pid=os.getpid(),
        device=assignment.device,
        first_layer=layers.start,
        num_layers=len(layers),
        num_heads=len(plan.heads[place.tp_rank]),
        num_kv_heads=len(plan.kv_heads[place.tp_rank]),
        vocab_size=spec.vocab_size,
        weight_bytes=decoder.num_bytes,
        kv_bytes=pages.num_bytes,
        num_kv_tokens=num_pages * served.block_size,
        device_bytes=device_bytes(mesh.spec.device),
    )
    runner = ShardRunner(decoder, pages, slots, sampler, mesh)
    hidden = torch.empty(spec.hidden_size, dtype=served.dtype, device=device)
    if _num_scratch_pages(assignment, served):
        recording = StepRecording(runner.compute, slots, mesh, num_pages, served.block_size, hidden)
        runner.use_recorded(recording.record())
    elif assignment.record_steps is None and served.encoder is None and (recorder := choose_recorder(device)):
        samples_here = place.stage == place.pp_size - 1
        runner.use_recorded(
            StepPrograms(recorder, runner.compute, slots, hidden if place.stage else None, samples_here)
        )
    lead = _take_lead(assignment, mesh, runner, limits, spec.vocab_size) if place.rank == 0 else None
    return Shard(assignment, info, mesh, runner, lead, num_borrowed_bytes)


def _take_lead(
    assignment: ShardAssignment, mesh: Mesh, runner: ShardRunner, limits: SchedulerLimits, vocab_size: int
) -> _Lead:
    """Refers to nothing of the shard: its memory is to go with it, not when garbage is collected."""
    info = ServedModel(
        vocab_size=vocab_size,
        max_model_len=limits.max_model_len,
        eos_token_ids=tuple(sorted(limits.eos_token_ids)),
        num_kv_tokens=limits.num_pages * limits.block_size,
        encoder=limits.encoder,
        prefix_block_size=limits.prefix_block_size,
        max_num_seqs=limits.max_num_seqs,
    )
    executor = MeshExecutor(mesh, runner, partial(_use_cores, assignment))
    return _Lead(Engine(limits, executor, info, runner.expert_imbalance), executor)


def _allocate_pages(assignment: ShardAssignment, served: ServedSpec, plan: ShardPlan, mesh: Mesh) -> KVPages:
    """As many pages as every rank of the mesh has room for."""
    place, device = mesh.spec, mesh.spec.device
    # Free memory is measured once everyone's weights are in it. A rank that dies meanwhile is noticed at once; one that
    # loads from a slow disk may take its time.
    mesh.agree_on_minimum("weights loaded", 1, timeout_s=_LOAD_TIMEOUT_S)
    memory = rank_memory(served, plan, place.stage, place.tp_rank, is_packed(device.type, served.dtype))
    grant = MemoryGrant(
        memory_utilization=assignment.memory_utilization,
        kv_memory_bytes=assignment.kv_memory_bytes,
        num_ranks_here=place.nodes.count(place.nodes[place.rank]) if device.type == "cpu" else 1,
    )
    num_pages = mesh.agree_on_minimum("pages", choose_num_pages(memory, grant, device))
    num_layers = num_cached_layers(served.spec, plan, place.stage)
    num_pages += _num_scratch_pages(assignment, served)
    return _pages(served, plan, place.tp_rank, num_layers, num_pages, device)


def _num_scratch_pages(assignment: ShardAssignment, served: ServedSpec) -> int:
    """Pages that no sequence gets: one for rows that only fill up a recorded step, where steps are to be recorded.

    The rows of a decoder with an encoder read pages of prompts besides, and are not.
    """
    wanted = assignment.device != "cpu" if assignment.record_steps is None else assignment.record_steps
    return int(wanted and served.spec.encoder is None)


def _encoder_pages(served: ServedSpec, plan: ShardPlan, tp_rank: int, device: torch.device) -> KVPages | None:
    """Room for the prompts of one step, in one layer."""
    if served.spec.encoder is None:
        return None
    return _pages(served, plan, tp_rank, 1, num_encoder_pages(served), device)


def _pages(
    served: ServedSpec, plan: ShardPlan, tp_rank: int, num_layers: int, num_pages: int, device: torch.device
) -> KVPages:
    num_kv_heads, head_dim = len(plan.kv_heads[tp_rank]), served.spec.attention.head_dim
    return KVPages(num_layers, num_pages, served.block_size, num_kv_heads, head_dim, served.dtype, device)


def _mesh_spec(assignment: ShardAssignment) -> MeshSpec:
    return MeshSpec(
        epoch=assignment.epoch,
        secret=assignment.secret,
        rank=assignment.rank,
        tp_size=assignment.tp_size,
        pp_size=assignment.pp_size,
        nodes=assignment.nodes,
        store_host=assignment.store_host,
        store_port=assignment.store_port,
        bind_host=assignment.bind_host,
        device=torch.device(assignment.device),
        timeout_s=assignment.step_timeout_s,
        form_timeout_s=assignment.form_timeout_s,
        tls=assignment.tls,
    )


def _pin(assignment: ShardAssignment) -> None:
    """Bind the calling thread, and those that it starts from now on, to this rank's cores, and it to its GPU."""
    if assignment.cpu_ids:
        os.sched_setaffinity(0, assignment.cpu_ids)
    device = torch.device(assignment.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # a thread's own as well: streams, events and graphs are the current device's


def _use_cores(assignment: ShardAssignment) -> None:
    """Let the calling thread, the one that runs the steps, compute with the rank's share of threads.

    No other thread of the process may: every thread that computes in parallel gets an OpenMP team of its own, and once
    the teams outnumber the cores their members sleep between operations instead of spinning, at half the speed.
    """
    _pin(assignment)
    torch.set_num_threads(assignment.num_threads)
