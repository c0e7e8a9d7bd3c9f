"""Runs step plans on one rank: each is laid out, run through the layers of the stage, and its tokens are drawn.

Steps are launched: on a GPU the host goes on to the next one while the device runs the last, and the tokens are fetched
when they are there. Nothing in a step may make the host wait for the device.

Legend: S sampling rows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import torch
from torch import Tensor

from shardray.parallel.errors import MeshError
from shardray.parallel.mesh import Mesh
from shardray.parallel.spans import SpanKind, Spans
from shardray.runtime.engine.coming import ComingResult, HostCopy
from shardray.runtime.engine.inputs import to_device, upload
from shardray.runtime.engine.programs import StepPrograms
from shardray.runtime.engine.recorded import RecordedSteps, StepOutput
from shardray.runtime.engine.sampler import Draw, Sampler
from shardray.runtime.engine.slots import SlotTable
from shardray.runtime.engine.step import StepPlan, StepResult
from shardray.runtime.engine.traced import StageTime
from shardray.runtime.model.attention import KVPages, StepView
from shardray.runtime.model.decoder import ShardedDecoder

_Read = Callable[[Sequence[Tensor]], StepResult | None]


class ShardRunner:
    """One rank's part of every step, in the order of the plans."""

    def __init__(
        self, decoder: ShardedDecoder, pages: KVPages, slots: SlotTable, sampler: Sampler | None, mesh: Mesh
    ) -> None:
        self._decoder = decoder
        self._pages = pages
        self._slots = slots
        self._sampler = sampler
        self._mesh = mesh
        self._device = mesh.spec.device
        self._recorded: RecordedSteps | StepPrograms | None = None
        self.num_steps = 0
        self.busy_s = 0.0  # from the launch of a step, or the end of the one before it, until its result was there
        self._last_end_s = 0.0
        self._spans: Spans | None = None
        self._begin_ns = 0  # since 1970: when the input of the last plan was there

    def start_trace(self) -> None:
        """Write down what every step does from now on. Thread-safe, as is ``stop_trace``."""
        self.stop_trace()
        spans, mesh = Spans(), self._mesh
        if mesh.tp.size > 1:
            for method in ("all_reduce", "all_gather", "gather", "broadcast"):
                spans.attach(mesh.tp, method, SpanKind.COLLECTIVE, method)
        if mesh.upstream is not None:
            spans.attach(mesh.upstream, "recv", SpanKind.BUBBLE, f"wait for stage {mesh.spec.stage - 1}")
        if mesh.downstream is not None:
            spans.attach(mesh.downstream, "send", SpanKind.HANDOVER, f"to stage {mesh.spec.stage + 1}")
        self._spans, recorded = spans, self._recorded
        if recorded is not None:
            recorded.spans = spans

    def stop_trace(self) -> Spans:
        """What was written down; empty if no trace was on."""
        spans, recorded = self._spans or Spans(), self._recorded
        self._spans = None
        if recorded is not None:
            recorded.spans = None
        spans.detach()
        return spans

    def expert_imbalance(self) -> float:
        """See ShardedDecoder."""
        return self._decoder.expert_imbalance()

    def use_recorded(self, steps: RecordedSteps | StepPrograms | None) -> None:
        """Run steps as they were recorded, if they were."""
        self._recorded = steps

    def forget_recorded(self) -> None:
        """Let go of what holds communicators: they can be neither aborted nor closed before that. Thread-safe."""
        self._recorded = None

    def launch(self, plan: StepPlan) -> ComingResult:
        """Begin one plan. Raises MeshError, as does the result when it is fetched.

        The result is of the tokens on the rank that samples, None on the others. Of a traced plan the first tensor rank
        of each stage has a result with the stage's time.
        """
        began_s = time.perf_counter()
        try:
            with torch.inference_mode():
                if (spans := self._spans) is None:
                    return self._launch(plan, began_s)
                begin_ns = time.monotonic_ns()
                coming = self._launch(plan, began_s)
                spans.note(SpanKind.STEP, _describe(plan), begin_ns)
                return coming
        except MeshError as error:
            error.step = plan.step
            raise

    def compute(self, hidden: Tensor | None, view: StepView, slots: Tensor, is_greedy: bool) -> StepOutput:
        """The layers of this stage; behind the last one the tokens, if the highest logit is all that matters. All on
        the device, and all that a recording holds."""
        out = self._decoder(hidden, self._pages, view)
        if out is None or not is_greedy or self._mesh.downstream is not None or len(slots) == 0:
            return StepOutput(out)
        tokens = self._decoder.best(out)
        if self._mesh.spec.pp_size == 1:  # with more stages the next plan carries them
            self._slots.set_last_tokens(slots, tokens)
        return StepOutput(out, tokens)

    def _launch(self, plan: StepPlan, began_s: float) -> ComingResult:
        self._slots.start(plan.starts)
        self._slots.grant(plan.grants)
        if plan.copies:
            sources, targets = to_device(plan.copies, self._device, torch.int64).T
            self._pages.copy(sources, targets)
        if self._sampler is not None:
            for start in plan.starts:
                self._sampler.start(start)
        lay_out, mesh = functools.cache(lambda: self._slots.lay_out(plan)), self._mesh
        hidden = None if mesh.upstream is None else mesh.upstream.recv(plan.num_tokens)
        self._begin_ns = time.time_ns()
        recorded = self._recorded  # read once: it may be forgotten meanwhile
        done = None if recorded is None else recorded.run(plan, lay_out, hidden)
        if done is not None:
            output, slots = done
        else:
            laid_out = lay_out()
            inputs = upload(laid_out.inputs, self._device)
            slots = inputs.sampling_slots
            output = self.compute(hidden, self._slots.as_view(inputs, laid_out), slots, plan.is_greedy)
        if mesh.downstream is not None:
            assert output.out is not None
            # What is under way must not be written over by the next recorded step.
            mesh.downstream.send(output.out if done is None else output.out.clone())
            return self._coming(plan, began_s, (), _read_nothing)
        if any(row.pooling is not None for row in plan.encoder_rows):
            assert output.out is not None
            return self._coming(plan, began_s, (output.out,), partial(_read_embeddings, plan.step))
        draw = self._draw(plan, output, slots)
        return self._coming(plan, began_s, draw.tensors(), lambda found: StepResult(plan.step, tuple(draw.read(found))))

    def _draw(self, plan: StepPlan, output: StepOutput, slots: Tensor) -> Draw:
        if plan.is_greedy and output.tokens is not None:
            return Draw(output.tokens)
        draw = Draw(torch.zeros_like(slots))
        logits = None if output.out is None else self._decoder.gather(output.out)
        if self._sampler is not None and logits is not None:
            draw = self._sampler.draw(logits, plan.sampled, plan.drafted)
        if len(slots) and self._mesh.spec.pp_size == 1:
            self._slots.set_last_tokens(slots, self._mesh.tp.broadcast(draw.tokens))
        return draw

    def _coming(self, plan: StepPlan, began_s: float, tensors: Sequence[Tensor], read: _Read) -> ComingResult:
        self.num_steps += 1
        read = read if self._sampler is not None else _read_nothing
        read = partial(self._read, read, plan, began_s, self._begin_ns)
        return ComingResult(HostCopy(tensors, self._device), read, partial(self._wait, plan.step))

    def _wait(self, step: int, ready: Callable[[], bool]) -> None:
        try:
            self._mesh.wait_for_device(ready, "step")
        except MeshError as error:
            error.step = step
            raise

    def _read(
        self, read: _Read, plan: StepPlan, began_s: float, begin_ns: int, tensors: Sequence[Tensor]
    ) -> StepResult | None:
        """Of a step that is done; steps are read in their order."""
        end_s = time.perf_counter()
        waited_s = max(0.0, self._last_end_s - began_s)  # for the step before this one
        self.busy_s += end_s - began_s - waited_s
        self._last_end_s = end_s
        result = read(tensors)
        if not plan.is_traced or self._mesh.spec.tp_rank != 0:
            return result
        begin_ns += int(waited_s * 1e9)
        stage = StageTime(begin_ns, max(0, time.time_ns() - begin_ns))
        return msgspec.structs.replace(result or StepResult(plan.step, ()), stages=(stage,))


def _read_nothing(tensors: Sequence[Tensor]) -> None:
    return None


def _read_embeddings(step: int, tensors: Sequence[Tensor]) -> StepResult:
    return StepResult(step, (), tuple(row.tobytes() for row in tensors[0].numpy()))


def _describe(plan: StepPlan) -> str:
    num_decodes = sum(row.num_tokens == 1 for row in plan.rows)
    prompts = [row.num_tokens for row in plan.rows if row.num_tokens > 1]
    prompts += [len(row.token_ids) for row in plan.encoder_rows]
    parts = [f"{num_decodes} decodes"] if num_decodes else []
    parts += [f"{sum(prompts)} tokens of {len(prompts)} prompts"] if prompts else []
    return f"step {plan.step}: {', '.join(parts)}"
