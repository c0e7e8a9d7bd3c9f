"""Checkpoints: any slice, only its bytes, and damage that is named."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shardray.parallel.checkpoint import Checkpoint, CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)


def save_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def num_bytes_read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@st.composite
def sliced_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[slice, ...]]:
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    index = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        start = draw(st.integers(0, size))
        index.append(draw(st.sampled_from([slice(None), slice(start, draw(st.integers(start, size)))])))
    return tensor, tuple(index)


@settings(max_examples=150)
@given(case=sliced_tensors(), data=st.data())
def test_any_slice_is_read_as_torch_would_slice_it_and_costs_exactly_its_bytes(
    case: tuple[torch.Tensor, tuple[slice, ...]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor, index = case
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder / "model.safetensors", {"before": torch.ones(3), "it": tensor, "zz": torch.ones(5)})
    checkpoint = Checkpoint(folder)
    found = checkpoint.read("it", index)
    expected = tensor[index]
    assert found.dtype == tensor.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert checkpoint.bytes_read == expected.numel() * expected.element_size()


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    weight = torch.randn(512, 1024)
    save(tmp_path / "model.safetensors", {"weight": weight, "bias": torch.zeros(7, dtype=torch.bfloat16)})
    before = num_bytes_read_by_this_process()
    checkpoint = Checkpoint(tmp_path)
    assert num_bytes_read_by_this_process() - before < 64 * 1024
    assert checkpoint.bytes_read == 0
    assert checkpoint.tensors["weight"].shape == (512, 1024)
    assert checkpoint.tensors["bias"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
)
def test_a_header_tells_the_dtype_and_the_bytes_of_an_element(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path / "model.safetensors", {"weight": torch.zeros(3, 5, dtype=dtype)})
    info = Checkpoint(tmp_path).tensors["weight"]
    assert (info.dtype, info.item_bytes, info.num_bytes) == (dtype, dtype.itemsize, 15 * dtype.itemsize)


@pytest.mark.parametrize("dim", [0, 1])
def test_three_uneven_ranks_together_take_each_byte_from_the_kernel_once(tmp_path: Path, dim: int) -> None:
    weight = torch.randn(512, 1024)
    save(tmp_path / "model.safetensors", {"weight": weight})
    cuts = [0, weight.shape[dim] // 3, weight.shape[dim] // 2, weight.shape[dim]]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        checkpoint = Checkpoint(tmp_path)
        before = num_bytes_read_by_this_process()
        parts.append(checkpoint.read("weight", (slice(None),) * dim + (slice(start, stop),)))
        taken = num_bytes_read_by_this_process() - before
        assert checkpoint.bytes_read == weight.nbytes * (stop - start) // weight.shape[dim]
        assert 0 <= taken - checkpoint.bytes_read < 4096  # what /proc itself costs
    assert torch.equal(torch.cat(parts, dim), weight)


def test_a_tensor_read_is_its_own_memory(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"weight": torch.ones(4, 4)})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("weight").zero_()
    assert torch.equal(checkpoint.read("weight"), torch.ones(4, 4))


def test_threads_read_at_once_and_every_byte_is_counted(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    save(tmp_path / "model.safetensors", {"weight": weight})
    checkpoint = Checkpoint(tmp_path)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(checkpoint.read("weight"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(tensor, weight) for tensor in found)
    assert checkpoint.bytes_read == 8 * weight.nbytes


def write_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4), "c": torch.randn(2, 2)}
    save(folder / "model-00001-of-00002.safetensors", {"a": tensors["a"], "b": tensors["b"]})
    save(folder / "model-00002-of-00002.safetensors", {"c": tensors["c"]})
    names = dict.fromkeys("ab", "model-00001-of-00002.safetensors") | {"c": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return tensors


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "model-00002-of-00002.safetensors"}, "says 'x' is in model-00002"),
        ({"a": "../secrets.safetensors"}, "not a file name"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors and model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path: Path) -> None:
    shared = torch.randn(3, 5)
    torch.save({"embed": shared, "head": shared.t()}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"norm": torch.ones(5)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="never loaded") as refusal:
        Checkpoint(tmp_path)
    command = shlex.split(str(refusal.value).split("convert them with: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=60)
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("head"), shared.t())
    assert set(checkpoint.tensors) == {"embed", "head", "norm"}


@pytest.mark.parametrize("kept_bytes", [0, 5, 40, -4])
def test_a_file_cut_short_is_named(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"weight": torch.ones(8, 8)})
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        Checkpoint(tmp_path)


def test_a_file_cut_short_after_opening_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"weight": torch.ones(8, 8)})
    checkpoint = Checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends inside 'weight'"):
        checkpoint.read("weight")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, "cannot lie in bytes 0 to 12"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]}, "begins at byte"),
        ({"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}, "its header describes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "its header describes"),
        ({"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}, "cannot lie"),
        ({"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]}, "dtype Q9"),
        ({"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}, "malformed"),
        ({"shape": [4], "data_offsets": [0, 16]}, "malformed"),
        (7, "malformed"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    save_raw(tmp_path / "model.safetensors", {"weight": entry}, bytes(16))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    save_raw(tmp_path / "model.safetensors", {"a": entry, "b": entry}, bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(tmp_path)


def test_integers_may_lie_in_a_checkpoint_but_are_not_read(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"positions": torch.arange(4), "weight": torch.ones(2)})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read("weight").tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"'positions' has dtype torch\.int64"):
        checkpoint.read("positions")


def test_an_unknown_tensor_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"model.norm.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"nearest name is 'model\.norm\.weight'"):
        Checkpoint(tmp_path).read("model.norms.weight")


@pytest.mark.parametrize("part", [slice(0, 5), slice(-1, None), slice(3, 2), slice(0, 4, 2)])
def test_a_slice_out_of_range_is_refused(tmp_path: Path, part: slice) -> None:
    save(tmp_path / "model.safetensors", {"weight": torch.ones(4, 2)})
    with pytest.raises(CheckpointError, match="does not fit dimension 0"):
        Checkpoint(tmp_path).read("weight", (part,))
