"""gpt-oss checkpoints in MXFP4: the logits of the same weights in float32, and each rank reads its own blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.plan import make_plan
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.parameters import model_sizes
from tests.model.logits import LogitsOf
from tests.model.test_families import distance, random_ids
from tests.model.zoo import ZOO, save
from tests.tiny_models import Reference


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model with its experts packed, and with what they unpack to according to transformers."""
    model_type, fields = ZOO["gpt-oss"]
    ZOO["gpt-oss, blocks"] = model_type, fields | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    plain, packed = (save("gpt-oss, blocks", tmp_path_factory.mktemp(name)) for name in ("plain", "packed"))
    del ZOO["gpt-oss, blocks"]
    tensors = load_file(plain / "model.safetensors")
    quantized = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, num_in, num_out = tensors[name].shape
        blocks = torch.randint(0, 256, (count, num_out, num_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 125, (count, num_out, num_in // 32), dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        del quantized[name]
        quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(quantized, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return plain, packed


def test_packed_experts_give_the_logits_of_what_they_unpack_to(folders: tuple[Path, Path]) -> None:
    plain, packed = folders
    ids = [i % 97 for i in random_ids(30, 1)]
    with LogitsOf(packed) as model:
        found = model.step({0: ids})[0]
    assert distance(found, Reference(plain).logits(ids)) < 2e-4


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["experts cut", "experts whole"])
def test_a_rank_reads_the_blocks_that_it_touches(folders: tuple[Path, Path], expert_parallel: bool) -> None:
    packed = folders[1]
    family, spec = read_model_config(packed)
    plan = make_plan(model_sizes(spec), 2, 1, expert_parallel=expert_parallel)
    read = 0
    for tp_rank in range(2):
        loaders = [
            ParameterLoader(Checkpoint(folder), family, spec, plan, tp_rank, torch.float32) for folder in folders
        ]
        for name, expected in loaders[0].layer(0).items():
            assert torch.equal(loaders[1].layer(0)[name], expected), name
        checkpoint = Checkpoint(packed)
        loaded = ParameterLoader(checkpoint, family, spec, plan, tp_rank, torch.float32).layer(0)
        others = sum(tensor.numel() for name, tensor in loaded.items() if not name.startswith("experts."))
        read += checkpoint.bytes_read - 4 * others
    whole = sum(
        info.dtype.itemsize * torch.Size(info.shape).numel()
        for name, info in Checkpoint(packed).tensors.items()
        if ".layers.0.mlp.experts." in name
    )
    # A cut through 96 columns goes through the second of three blocks, which both ranks read.
    assert whole <= read <= (1.0 if expert_parallel else 1.25) * whole
