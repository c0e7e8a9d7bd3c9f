"""The name of a rank's weights tells apart all that their bytes depend on, and nothing else."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shardray.parallel.checkpoint import Checkpoint
from shardray.runtime.engine.shapes import cut
from shardray.runtime.model import weights_name as naming
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.weights_name import weights_name
from tests.tiny_models import save_llama


def name_of(
    folder: Path, tp_size: int = 1, pp_size: int = 1, rank: int = 0, dtype: torch.dtype = torch.bfloat16
) -> str:
    family, spec = read_model_config(folder)
    place = divmod(rank, tp_size)
    return weights_name(Checkpoint(folder), family, spec, cut(spec, tp_size, pp_size, False), *place, dtype)


def test_another_slice_dtype_or_folder_has_another_name(tmp_path: Path) -> None:
    folders = [save_llama(tmp_path / "a"), save_llama(tmp_path / "b")]
    shapes = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]
    places = [(*shape, rank) for shape in shapes for rank in range(shape[0] * shape[1])]
    cases = list(itertools.product(folders, places, (torch.float32, torch.bfloat16)))
    names = [name_of(folder, *place, dtype=dtype) for folder, place, dtype in cases]
    assert len(set(names)) == len(cases)
    assert names == [name_of(folder, *place, dtype=dtype) for folder, place, dtype in cases]


def test_a_process_with_another_hash_seed_gives_the_same_name(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    code = f"import pathlib, tests.model.test_weights_name as t; print(t.name_of(pathlib.Path({str(folder)!r}), 2))"
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert found.stdout.strip() == name_of(folder, 2)


def test_weights_written_anew_in_the_same_size_and_with_the_old_times_have_another_name(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    path, before = folder / "model.safetensors", name_of(folder)
    found = path.stat()
    with path.open("r+b") as file:  # in place, one byte of the last tensor
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_size == found.st_size
    assert (changed := name_of(folder)) != before
    save_file(load_file(path), path, metadata={"format": "pt"})
    assert name_of(folder) not in (before, changed)


def test_another_version_of_the_code_has_another_name(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    before, code = name_of(folder), naming._CODE
    assert {path.name for path in code} == {"model", "parallel"}
    assert any(path.name == "linear.py" for path in code[1].rglob("*.py")), "what packs weights is part of it"
    try:
        naming._CODE = (tmp_path,)
        (tmp_path / "pack.py").write_text("1")
        names = {before}
        for text in ("1", "2"):
            (tmp_path / "pack.py").write_text(text)
            naming._code_digest.cache_clear()
            names.add(name_of(folder))
        assert len(names) == 3
    finally:
        naming._CODE = code
        naming._code_digest.cache_clear()


@given(parts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 11)), min_size=2, max_size=2))
def test_two_places_have_one_name_only_if_they_are_one(parts: list[tuple[int, int, int]], tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = _folder(tmp_path_factory)
    places = [(tp, pp, rank % (tp * pp)) for tp, pp, rank in parts]
    names = {name_of(folder, *place) for place in places}
    assert len(names) == len(set(places))


def _folder(factory) -> Path:  # type: ignore[no-untyped-def]
    root: Path = factory.getbasetemp() / "named"
    return root if root.exists() else save_llama(root, num_hidden_layers=3)
