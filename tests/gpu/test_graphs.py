"""Recorded decode steps, late results and staged loading on CUDA: run these first on a machine with a GPU.

In this order, for each stands on the one before: what the runtime uses of torch, then a small model, then several.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shardray import LLM, SamplingParams
from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.filling import open_filling
from shardray.runtime.engine.inputs import DecodeShape, StaticInputs
from shardray.runtime.engine.recorder import GraphRecorder, find_obstacle
from shardray.runtime.engine.sampler import Sampler
from shardray.runtime.engine.step import SlotStart
from tests.engine.test_recorded import PARAMS
from tests.tiny_models import Reference, save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
SIZES = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny"), **SIZES)


def test_a_graph_runs_again_over_inputs_that_stay_where_they_are() -> None:
    recorder, x = GraphRecorder(CUDA), torch.ones(4, device=CUDA)
    again = [recorder.record(lambda count=count: (x[:count] * 2, None)) for count in (4, 2)]
    for value in (3.0, 5.0):
        x.fill_(value)
        for replay, count in zip(again, (4, 2), strict=True):
            doubled, nothing = replay()
            assert doubled.tolist() == [2 * value] * count
            assert nothing is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_a_graph_leaves_keeps_its_shape_and_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(6, device=CUDA).to(dtype).view(2, 3)
    (found,) = GraphRecorder(CUDA).record(lambda: (x + 1,))()
    assert torch.equal(found, x + 1)
    assert found.dtype == dtype


@pytest.mark.parametrize(
    "run", [lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x + torch.tensor([1.0, 2.0], device=CUDA)]
)
def test_what_needs_the_host_is_found_before_it_is_captured(run: Any) -> None:
    assert find_obstacle(lambda: run(torch.ones(2, device=CUDA))) is not None


def test_one_copy_brings_a_step_and_later_ones_do_not_overwrite_it() -> None:
    static = StaticInputs(DecodeShape(2, 3, 16, 9, 2), CUDA, num_buffers=3)
    seen = []
    for step in range(20):
        arrays = type(static.tensors)(*(part.cpu().numpy().copy() for part in static.tensors if part is not None))
        arrays.positions[:] = step
        static.fill(arrays)
        seen.append(static.tensors.positions.clone())
    assert [int(positions[0]) for positions in seen] == list(range(20))


@pytest.mark.parametrize("fields", PARAMS, ids=str)
def test_drawing_waits_for_nothing(fields: dict[str, Any]) -> None:
    sampler = Sampler(5000, (2,), CUDA)
    params = SamplingParams(**{"seed": 3, "max_tokens": 16} | fields)
    for slot in range(3):
        sampler.start(SlotStart(slot, params, (5, 6), (), 0))
    logits = torch.randn(3, 5000, device=CUDA)
    sampler.draw(logits.clone(), [(0, 2), (1, 2), (2, 2)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw = sampler.draw(logits.clone(), [0, 1, 2], [3, 3, 3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(draw.read([tensor.cpu() for tensor in draw.tensors()])) == 3


def test_staged_weights_are_the_stored_bytes(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    with open_filling(CUDA) as filling:
        found = {name: torch.empty(info.shape, device=CUDA) for name, info in checkpoint.tensors.items()}
        for name, target in found.items():
            filling.fill(target, checkpoint, name, ())
        filling.finish()
        for name, target in found.items():
            assert torch.equal(target.cpu(), checkpoint.read(name)), name


def recorded_sizes(llm: LLM) -> list[int]:
    recorded = llm._mesh._shard._runner._recorded
    return [] if recorded is None else recorded.sizes


def test_steps_in_graphs_give_the_tokens_of_transformers(folder: Path) -> None:
    reference = Reference(folder)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [tuple(range(3, 9 + 7 * i)) for i in range(7)]
    with LLM(folder, dtype="float32", device="cuda:0", max_num_seqs=5) as llm:
        if not recorded_sizes(llm):
            pytest.skip("nothing is recorded: attention here is the reference, which needs the host")
        found = [completion.token_ids for completion in llm.generate(prompts, params)]
    assert found == [reference.greedy(prompt, 40) for prompt in prompts]


def test_sampled_and_penalized_rows_are_the_same_in_graphs_and_without(folder: Path) -> None:
    params = [SamplingParams(**{"seed": 4, "max_tokens": 24, "ignore_eos": True} | fields) for fields in PARAMS]
    prompts = [tuple(range(3, 8 + 5 * i)) for i in range(len(params))]
    found = []
    for record_steps in (True, False):
        with LLM(folder, dtype="float32", device="cuda:0", max_num_seqs=6, record_steps=record_steps) as llm:
            found.append([completion.token_ids for completion in llm.generate(prompts, params)])
    assert found[0] == found[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_graphs_hold_nccl_and_close_in_time(folder: Path, shape: tuple[int, int]) -> None:
    reference = Reference(folder)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [tuple(range(3, 9 + 7 * i)) for i in range(7)]
    sizes = {"tensor_parallel_size": shape[0], "pipeline_parallel_size": shape[1]}
    llm = LLM(folder, dtype="float32", device="cuda", max_num_seqs=5, **sizes)
    found = [completion.token_ids for completion in llm.generate(prompts, params)]
    begin_s = time.monotonic()
    llm.close()
    assert time.monotonic() - begin_s < 10
    assert found == [reference.greedy(prompt, 40) for prompt in prompts]
