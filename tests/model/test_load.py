"""Each rank reads the bytes that it owns and no others; a checkpoint that does not fit is refused with every name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.parallel.plan import ShardPlan, make_plan
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.load import ParameterLoader, Parameters
from shardray.runtime.model.parameters import (
    Parameter,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    model_sizes,
)
from shardray.runtime.model.spec import DecoderSpec
from tests.tiny_models import save_gpt2, save_llama

SINGLE_FILE = "model.safetensors"
SHAPES = [(1, 1, None), (2, 1, None), (3, 2, None), (5, 3, None), (7, 1, None), (2, 2, (3.0, 1.0))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    biases = {"attention_bias": True, "mlp_bias": True}
    return {
        "llama": save_llama(root / "llama", tie_word_embeddings=False),
        "llama-tied": save_llama(root / "llama-tied", tie_word_embeddings=True, **biases),
        "gpt2": save_gpt2(root / "gpt2"),
        "gpt2-untied": save_gpt2(root / "gpt2-untied", tie_word_embeddings=False),
    }


NAMES = ["llama", "llama-tied", "gpt2", "gpt2-untied"]


def open_loader(folder: Path, plan: ShardPlan | None = None, tp_rank: int = 0) -> ParameterLoader:
    family, spec = read_model_config(folder)
    plan = plan or make_plan(model_sizes(spec), 1, 1)
    return ParameterLoader(Checkpoint(folder), family, spec, plan, tp_rank, torch.float32)


def load_stage(loader: ParameterLoader, plan: ShardPlan, stage: int) -> list[Parameters]:
    parts = [loader.embedding()] if stage == 0 else []
    parts += [loader.layer(index) for index in plan.stages[stage]]
    return [*parts, loader.head()] if stage == plan.pp_size - 1 else parts


def owned_bytes(parameters: dict[str, Parameter], plan: ShardPlan, tp_rank: int) -> int:
    slices = (parameter.owned(plan, tp_rank) for parameter in parameters.values())
    return sum(4 * math.prod(part.stop - part.start for part in index) for index in slices)


def expected_bytes(spec: DecoderSpec, plan: ShardPlan, stage: int, tp_rank: int) -> int:
    total = len(plan.stages[stage]) * owned_bytes(layer_parameters(spec, spec.layers[0]), plan, tp_rank)
    first, last = stage == 0, stage == plan.pp_size - 1
    if first:
        total += owned_bytes(embedding_parameters(spec), plan, tp_rank)
    if last:
        head = head_parameters(spec)
        if first and spec.head.tied:
            del head["head.weight"]  # the embedding's rows, which this rank has
        total += owned_bytes(head, plan, tp_rank)
    return total


@pytest.mark.parametrize(("tp_size", "pp_size", "split"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_reads_the_bytes_that_it_owns_and_no_others(
    folders: dict[str, Path], name: str, tp_size: int, pp_size: int, split: tuple[float, ...] | None
) -> None:
    family, spec = read_model_config(folders[name])
    plan = make_plan(model_sizes(spec), tp_size, pp_size, split)
    for stage in range(pp_size):
        for tp_rank in range(tp_size):
            checkpoint = Checkpoint(folders[name])
            loader = ParameterLoader(checkpoint, family, spec, plan, tp_rank, torch.float32)
            assert checkpoint.bytes_read == 0  # the check needs the headers only
            load_stage(loader, plan, stage)
            assert checkpoint.bytes_read == expected_bytes(spec, plan, stage, tp_rank)


@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_parts_put_together_are_the_checkpoint(folders: dict[str, Path], name: str) -> None:
    _, spec = read_model_config(folders[name])
    whole = open_loader(folders[name])
    plan = make_plan(model_sizes(spec), 3, 1)
    loaders = [open_loader(folders[name], plan, tp_rank) for tp_rank in range(3)]
    for read, parameters in (
        (ParameterLoader.embedding, embedding_parameters(spec)),
        (lambda loader: loader.layer(1), layer_parameters(spec, spec.layers[1])),
        (ParameterLoader.head, head_parameters(spec)),
    ):
        expected = read(whole)
        for tp_rank, loader in enumerate(loaders):
            part = read(loader)
            assert part.keys() == expected.keys() == parameters.keys()
            for key, tensor in part.items():
                assert torch.equal(tensor, expected[key][parameters[key].owned(plan, tp_rank)]), key
                assert tensor.is_contiguous()


def test_a_head_tied_on_the_same_rank_is_the_same_tensor(folders: dict[str, Path]) -> None:
    loader = open_loader(folders["llama-tied"])
    assert loader.embedding()["embed.weight"] is loader.head()["head.weight"]


def test_the_fused_matrix_of_gpt2_is_taken_apart(folders: dict[str, Path]) -> None:
    stored = load_file(folders["gpt2"] / SINGLE_FILE)
    layer = open_loader(folders["gpt2"]).layer(2)
    fused = stored["transformer.h.2.attn.c_attn.weight"]  # (in, 3 * hidden)
    for part, found in zip(fused.split(60, dim=1), (layer[f"{name}.weight"] for name in "qkv"), strict=True):
        assert torch.equal(found, part.t())
    biases = stored["transformer.h.2.attn.c_attn.bias"].split(60)
    assert all(torch.equal(layer[f"{name}.bias"], part) for name, part in zip("qkv", biases, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_that_was_asked_for(folders: dict[str, Path], dtype: torch.dtype) -> None:
    family, spec = read_model_config(folders["llama"])
    plan = make_plan(model_sizes(spec), 1, 1)
    loader = ParameterLoader(Checkpoint(folders["llama"]), family, spec, plan, 0, dtype)
    assert {tensor.dtype for tensor in loader.layer(0).values()} == {dtype}


def shard(source: Path, target: Path, num_files: int) -> Path:
    """The same tensors in several files, with an index."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / SINGLE_FILE)
    weight_map = {name: f"model-{i % num_files + 1:05}-of-{num_files:05}.safetensors" for i, name in enumerate(tensors)}
    for file_name in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file_name}, target / file_name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def test_a_sharded_checkpoint_loads_like_a_single_file(folders: dict[str, Path], tmp_path: Path) -> None:
    family, spec = read_model_config(folders["llama"])
    plan = make_plan(model_sizes(spec), 2, 2)
    checkpoint = Checkpoint(shard(folders["llama"], tmp_path / "sharded", 3))
    for stage in range(2):
        before = checkpoint.bytes_read
        found = load_stage(ParameterLoader(checkpoint, family, spec, plan, 1, torch.float32), plan, stage)
        single = load_stage(open_loader(folders["llama"], plan, 1), plan, stage)
        assert checkpoint.bytes_read - before == expected_bytes(spec, plan, stage, 1)
        for part, expected in zip(found, single, strict=True):
            assert all(torch.equal(part[key], expected[key]) for key in expected)


def rewrite(source: Path, target: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint with tensors replaced, added, or (None) left out."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {**load_file(source / SINGLE_FILE), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, target / SINGLE_FILE)
    return target


def test_missing_unexpected_and_ill_shaped_tensors_are_named_all_at_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    changes = {
        "model.layers.3.mlp.up_proj.weight": None,
        "model.norm.weight": None,
        "model.layers.0.self_attn.q_norm.weight": torch.ones(16),
        "model.layers.1.self_attn.k_proj.weight": torch.ones(40, 72),
    }
    folder = rewrite(folders["llama"], tmp_path / "broken", changes)
    with pytest.raises(CheckpointError) as caught:
        open_loader(folder)
    assert str(caught.value) == (
        f"{folder}: does not hold this model's tensors. "
        "missing: model.layers.3.mlp.up_proj.weight, model.norm.weight; "
        "unexpected: model.layers.0.self_attn.q_norm.weight; "
        "of another shape than config.json says: model.layers.1.self_attn.k_proj.weight (40, 72) instead of (48, 72)"
    )


def test_many_names_are_shortened(folders: dict[str, Path], tmp_path: Path) -> None:
    extra = {f"extra.{index:02}": torch.ones(1) for index in range(20)}
    folder = rewrite(folders["llama"], tmp_path / "extra", extra)
    with pytest.raises(CheckpointError, match=r"unexpected: extra.00, .*, extra.07 and 12 more$"):
        open_loader(folder)


def test_an_untied_head_that_is_missing_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(folders["llama"], tmp_path / "headless", {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        open_loader(folder)


def test_masks_and_frequencies_that_some_checkpoints_keep_are_ignored(folders: dict[str, Path], tmp_path: Path) -> None:
    open_loader(
        rewrite(folders["llama-tied"], tmp_path / "a", {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "lm_head.weight": torch.ones(251, 72),
        })
    )  # fmt: skip
    open_loader(
        rewrite(folders["gpt2"], tmp_path / "b", {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        })
    )  # fmt: skip


def test_gpt2_names_come_with_and_without_their_prefix(folders: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    rewrite(folders["gpt2"], bare, {})
    tensors = load_file(bare / SINGLE_FILE)
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, bare / SINGLE_FILE)
    expected, found = open_loader(folders["gpt2"]).layer(0), open_loader(bare).layer(0)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(CheckpointError, match=r"missing: h\.1\.ln_1\.bias$"):
        open_loader(rewrite(bare, tmp_path / "less", {"h.1.ln_1.bias": None}))
