"""Models with weights of 8 bits: written by ``shardray quantize``, read, and held against the floats they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardray.parallel import layers
from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.parallel.plan import make_plan
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.model_cache import ModelSourceError
from shardray.runtime.model.parameters import model_sizes, num_owned_bytes
from shardray.runtime.model.quantize import quantize_folder
from shardray.runtime.model.spec import ModelConfigError
from tests.model.encoder_zoo import PairReference, save_encoder
from tests.model.logits import LogitsOf
from tests.model.test_families import distance, random_ids
from tests.model.zoo import ZOO, save

IDS = [token_id % 97 for token_id in random_ids(40, 3)]


def quantized(source: Path, folder: Path) -> Path:
    folder.mkdir()
    quantize_folder(source, folder)
    return folder


def logits(folder: Path, dtype: str = "float32") -> Tensor:
    with LogitsOf(folder, dtype) as model:
        return torch.cat([model.step({0: part})[0] for part in (IDS[:29], *([one] for one in IDS[29:]))])


def widen(folder: Path, target: Path, transposed: str | None = None) -> Path:
    """The same model with floats that say exactly what its numbers and scales say.

    ``transposed``: in the names of those that are stored as (in, out).
    """
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    scales = {name: tensors.pop(name) for name in [*tensors] if name.endswith("_scale")}
    for name, scale in scales.items():
        values = tensors[name.removesuffix("_scale")].float()
        tensors[name.removesuffix("_scale")] = values * (scale.mT if transposed and transposed in name else scale)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


# Each kind of storage: separate matrices, fused ones, rows that take turns, transposed ones, experts one by one and
# stacked, latent projections, tied heads and untied ones
KINDS = [
    "bloom", "deepseek-v3", "falcon, new", "gemma2", "gpt-neox", "gpt2", "llama", "mixtral", "mpt", "olmoe", "phi3",
]  # fmt: skip


TRANSPOSED = {"gpt2": ".h.", "gpt-oss": ".experts."}


@pytest.mark.parametrize("name", ZOO)
def test_a_quantized_model_says_what_its_numbers_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(name, tmp_path / "source")
    folder = quantized(source, tmp_path / "quantized")
    expected = logits(widen(folder, tmp_path / "widened", TRANSPOSED.get(name)))
    if name in KINDS:
        assert typical(logits(folder), expected) < 0.06  # products round their inputs to 8 bits
        assert 0 < typical(expected, logits(source)) < 0.06
    monkeypatch.setattr(layers, "packed_layout", lambda device_type, dtype: None)
    assert distance(logits(folder), expected) < 2e-4


@pytest.mark.parametrize("name", ["bart", "t5", "marian"])
def test_a_decoder_behind_an_encoder_says_what_its_numbers_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized(save_encoder(name, tmp_path / "source"), tmp_path / "quantized")
    reference = PairReference(widen(folder, tmp_path / "widened"))
    expected = reference.logits(IDS[:20], IDS[20:30])
    found = []
    for layout in (layers.packed_layout, lambda device_type, dtype: None):
        monkeypatch.setattr(layers, "packed_layout", layout)
        with LogitsOf(folder) as model:
            found.append(model.step({0: IDS[20:30]}, {0: IDS[:20]})[0])
    assert typical(found[0], expected) < 0.06
    assert distance(found[1], expected) < 2e-4


def typical(found: Tensor, expected: Tensor) -> float:
    """Of a token: a little noise may send one to other experts."""
    return float(((found - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)).median())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "deepseek-v3", "phi3"])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_a_rank_reads_and_holds_the_bytes_that_it_owns(name: str, expert_parallel: bool, tmp_path: Path) -> None:
    folder = quantized(save(name, tmp_path / "source"), tmp_path / "quantized")
    family, spec = read_model_config(folder)
    plan = make_plan(model_sizes(spec), 2, 3, expert_parallel=expert_parallel)
    for rank in range(6):
        stage, tp_rank = divmod(rank, 2)
        checkpoint = Checkpoint(folder)
        loader = ParameterLoader(checkpoint, family, spec, plan, tp_rank, torch.float32)
        parts = [loader.embedding()] if stage == 0 else []
        parts += [loader.layer(index) for index in plan.stages[stage]]
        parts += [loader.head()] if stage == 2 else []
        held = sum(tensor.nbytes for part in parts for tensor in part.values())
        assert checkpoint.bytes_read == held == num_owned_bytes(spec, plan, stage, tp_rank, item_bytes=4)


def test_a_head_that_is_tied_becomes_one_of_its_own_and_the_embedding_stays(tmp_path: Path) -> None:
    source = save("gemma", tmp_path / "source")
    _, spec = read_model_config(source)
    assert spec.head.tied
    folder = quantized(source, tmp_path / "quantized")
    _, spec = read_model_config(folder)
    assert (spec.head.tied, spec.head.in_int8) == (False, True)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    head = after["lm_head.weight"] * after["lm_head.weight_scale"]
    assert distance(head, before["model.embed_tokens.weight"]) < 0.01


def test_what_a_rank_holds_is_what_memory_is_planned_with(tmp_path: Path) -> None:
    folder = quantized(save("llama", tmp_path / "source"), tmp_path / "quantized")
    _, spec = read_model_config(folder)
    with LogitsOf(folder, "bfloat16") as model:
        held = model._shard._runner._decoder.num_bytes
    assert held == num_owned_bytes(spec, make_plan(model_sizes(spec), 1, 1), 0, 0, item_bytes=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shared_weights_of_8_bits_give_the_same_bits(dtype: str, tmp_path: Path) -> None:
    folder = quantized(save("llama", tmp_path / "source"), tmp_path / "quantized")
    alone = logits(folder, dtype)
    with LogitsOf(folder, dtype, share_weights=True) as first, LogitsOf(folder, dtype, share_weights=True) as second:
        assert (first.num_borrowed_bytes, second.num_borrowed_bytes > 0) == (0, True)
        assert torch.equal(second.step({0: IDS[:29]})[0], alone[:29])
        assert torch.equal(first.step({0: IDS[:29]})[0], alone[:29])


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    folder = quantized(save("llama", tmp_path / "source"), tmp_path / "quantized")
    (tmp_path / "again").mkdir()
    with pytest.raises(ModelSourceError, match="is quantized already; quantize the float checkpoint"):
        quantize_folder(folder, tmp_path / "again")


def changed(folder: Path, change: dict[str, Any], **weights: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "weights"),
    [
        ({"format": "pack-quantized"}, {}),
        ({}, {"num_bits": 4}),
        ({}, {"symmetric": False}),
        ({}, {"strategy": "group"}),
        ({}, {"type": "float"}),
    ],
)
def test_other_formats_are_refused_with_what_is_read(
    change: dict[str, Any], weights: dict[str, Any], tmp_path: Path
) -> None:
    folder = changed(quantized(save("llama", tmp_path / "source"), tmp_path / "quantized"), change, **weights)
    with pytest.raises(ModelConfigError, match="weights of 8 bits with a scale for each output are read"):
        read_model_config(folder)


def test_numbers_where_floats_are_expected_are_named(tmp_path: Path) -> None:
    folder = quantized(save("llama", tmp_path / "source"), tmp_path / "quantized")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"], dtype=torch.int8)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    family, spec = read_model_config(folder)
    plan = make_plan(model_sizes(spec), 1, 1)
    named = "of another kind than config.json says: model.layers.0.mlp.up_proj.weight F32, model.norm.weight I8"
    with pytest.raises(CheckpointError, match=named):
        ParameterLoader(Checkpoint(folder), family, spec, plan, 0, torch.float32)
