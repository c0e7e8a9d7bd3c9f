"""Weights that come through staging buffers, in pieces and by several threads, are the bytes that are read directly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.parallel.filling import DirectFilling, Filling, StagedFilling
from shardray.parallel.layers import ColumnParallelLinear
from shardray.parallel.rows import join_rows
from shardray.runtime.engine.shapes import cut
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.load import ParameterLoader
from tests.model.zoo import save

CPU = torch.device("cpu")


def all_parameters(folder: Path, tp_size: int, tp_rank: int, dtype: torch.dtype, filling: Filling) -> dict[str, Tensor]:
    family, spec = read_model_config(folder)
    plan = cut(spec, tp_size, 1, expert_parallel=False)
    loader = ParameterLoader(Checkpoint(folder), family, spec, plan, tp_rank, dtype, filling)
    found = {**loader.embedding(), **loader.head()}
    for index in range(spec.num_layers):
        found |= {f"{index}.{name}": tensor for name, tensor in loader.layer(index).items()}
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "deepseek-v3", "mixtral", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_weights_are_those_that_are_read_directly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    for tp_size, tp_rank in ((1, 0), (3, 1)):
        staged = StagedFilling(CPU, num_threads=3, buffer_bytes=1000)  # less than most tensors
        expected = all_parameters(folder, tp_size, tp_rank, dtype, DirectFilling(CPU))
        found = all_parameters(folder, tp_size, tp_rank, dtype, staged)
        staged.close()
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key]), key


def test_projections_that_a_layer_merges_lie_together_and_are_not_copied(tmp_path: Path) -> None:
    found = all_parameters(save("llama", tmp_path), 1, 0, torch.float32, DirectFilling(CPU))
    for names in (("q", "k", "v"), ("gate", "up")):
        parts = [found[f"0.{name}.weight"] for name in names]
        merged = join_rows(parts)
        assert merged.data_ptr() == parts[0].data_ptr()
        assert torch.equal(merged, torch.cat(parts))
    x = torch.randn(2, found["0.q.weight"].shape[1])
    parts = [found[f"0.{name}.weight"] for name in ("q", "k", "v")]
    assert torch.allclose(ColumnParallelLinear.merged(parts, None)(x), x @ torch.cat(parts).T, atol=1e-4)


def test_rows_that_do_not_follow_one_another_are_copied() -> None:
    whole = torch.arange(24.0).view(6, 4)
    for parts in ([whole[:2], whole[3:]], [whole[2:], whole[:2]], [whole[:, :2], whole[:, 2:]], [whole, whole.clone()]):
        assert torch.equal(join_rows(parts), torch.cat(parts))


def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    checkpoint = Checkpoint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(40_000)
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    filling = StagedFilling(CPU)
    filling.fill(torch.empty(last.shape), checkpoint, last.name, ())
    with pytest.raises(CheckpointError, match="was cut short while in use"):
        filling.finish()
    filling.close()
