"""Every family against ``transformers``: the logits of prefills in chunks and of decodes, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.comm import SoloComm
from shardray.parallel.plan import make_plan
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.kernels.ops import Ops
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.mlp import ExpertsBlock, OwnExperts
from shardray.runtime.model.parameters import model_sizes, num_owned_elements
from shardray.runtime.model.spec import Experts
from tests.model.logits import LogitsOf
from tests.model.test_families import distance, random_ids
from tests.model.zoo import WITH_EXPERTS, ZOO, save
from tests.tiny_models import Reference

NUM_DECODES = 24
TOLERANCE = 2e-4  # of the largest logit


@pytest.mark.parametrize("name", ZOO)
def test_a_family_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    reference = Reference(folder)
    lens = [29, 17]
    sequences = [[i % 97 for i in random_ids(count + NUM_DECODES, seed)] for seed, count in enumerate(lens)]
    found: list[list[torch.Tensor]] = [[], []]
    with LogitsOf(folder) as model:
        feeds = [[13, lens[0] - 13, *[1] * NUM_DECODES], [lens[1] - 1, 1, *[1] * NUM_DECODES]]
        starts = [0, 0]
        for counts in zip(*feeds, strict=True):
            rows = {slot: sequences[slot][starts[slot] : starts[slot] + count] for slot, count in enumerate(counts)}
            for slot, part in model.step(rows).items():
                found[slot].append(part)
                starts[slot] += len(rows[slot])
    for ids, parts in zip(sequences, found, strict=True):
        assert distance(torch.cat(parts), reference.logits(ids)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "expert_parallel"), [*((name, False) for name in ZOO), *((name, True) for name in WITH_EXPERTS)]
)
def test_a_rank_reads_the_bytes_that_it_owns_and_no_more(name: str, expert_parallel: bool, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    family, spec = read_model_config(folder)
    plan = make_plan(model_sizes(spec), 3, 2, expert_parallel=expert_parallel)
    for rank in range(6):
        stage, tp_rank = divmod(rank, 3)
        checkpoint = Checkpoint(folder)
        loader = ParameterLoader(checkpoint, family, spec, plan, tp_rank, torch.float32)
        parts = [loader.embedding()] if stage == 0 else []
        parts += [loader.layer(index) for index in plan.stages[stage]]
        parts += [loader.head()] if stage == 1 else []
        owned = num_owned_elements(spec, plan, stage, tp_rank)
        assert sum(tensor.numel() for part in parts for tensor in part.values()) == owned
        assert checkpoint.bytes_read == 4 * owned


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_deepseek_routes_in_float32_whatever_the_dtype(name: str, tmp_path: Path) -> None:
    """Corrections far from zero, as those published are: bfloat16 has steps of 1/32 there, wider than scores differ."""
    path = save(name, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    for stored in [stored for stored in tensors if stored.endswith("correction_bias")]:
        tensors[stored] = 7.0 + 0.02 * torch.randn(tensors[stored].shape)
    save_file(tensors, path, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)

    family, spec = read_model_config(tmp_path)
    plan, experts = make_plan(model_sizes(spec), 1, 1), spec.layers[1].mlp
    assert isinstance(experts, Experts)
    parameters = ParameterLoader(Checkpoint(tmp_path), family, spec, plan, 0, torch.bfloat16).layer(1)
    block = ExpertsBlock(experts, OwnExperts(), parameters, SoloComm(), Ops())
    x = torch.randn(400, spec.hidden_size, generator=torch.Generator().manual_seed(5)).bfloat16()
    weights, chosen = block._route(x)
    _, expected_weights, expected = model.model.layers[1].mlp.gate(x)
    assert torch.equal(chosen.sort().values, expected.sort().values)
    torch.testing.assert_close(weights.sort().values, expected_weights.sort().values)
