"""Whether the cluster can hold a shape, told before anything is touched: planning, room for hosts, memory."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from shardray.parallel.plan import PlanError, ShardPlan, make_plan
from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.cluster.replica_set import ReplicaSet
from shardray.runtime.driver.operations import OperationRefusedError
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.folder import read_json
from shardray.runtime.model.parameters import model_sizes, num_cached_layers, num_owned_elements
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = 1 << 30


async def check_room(fleet: ReplicaSet, recipe: MeshRecipe, num_replicas: int) -> None:
    """Raises OperationRefusedError with numbers if ``num_replicas`` meshes of ``recipe`` cannot be had."""
    try:
        _, spec = read_model_config(Path(recipe.model_dir))
        parallel = recipe.config.parallel
        plan = make_plan(
            model_sizes(spec), parallel.tensor_parallel_size, parallel.pipeline_parallel_size,
            parallel.tensor_split, parallel.stage_layers, parallel.expert_parallel,
        )  # fmt: skip
    except (PlanError, ModelConfigError) as error:
        raise OperationRefusedError(str(error)) from error
    if (reason := await fleet.shortage_of(recipe.size * num_replicas)) is not None:
        raise OperationRefusedError(reason)
    _check_memory(fleet, recipe, spec, plan, num_replicas)


def _check_memory(fleet: ReplicaSet, recipe: MeshRecipe, spec: DecoderSpec, plan: ShardPlan, num_replicas: int) -> None:
    """Weights, and the keys and values of one sequence, against what the hosts' nodes had free when they started."""
    needs = [_rank_bytes(recipe, spec, plan, rank) for rank in range(recipe.size)]
    capacities = fleet.memory_of_nodes()
    share = recipe.config.engine.memory_utilization
    most, total = max(capacities, default=0) * share, sum(capacities) * share
    if max(needs) > most:
        raise OperationRefusedError(
            f"rank {needs.index(max(needs))} needs {max(needs) / _GIB:.2f} GiB for its weights and one sequence, "
            f"a host has {most / _GIB:.2f} GiB; use more shards"
        )
    if sum(needs) * num_replicas > total:
        raise OperationRefusedError(
            f"{num_replicas} × {recipe.size} shards need {sum(needs) * num_replicas / _GIB:.2f} GiB for weights and a "
            f"sequence each, the hosts have {total / _GIB:.2f} GiB in all; use fewer replicas"
        )


def _rank_bytes(recipe: MeshRecipe, spec: DecoderSpec, plan: ShardPlan, rank: int) -> int:
    stage, tp_rank = divmod(rank, plan.tp_size)
    item_bytes = _item_bytes(recipe)
    kv_bytes = recipe.config.engine.kv_memory_bytes
    if kv_bytes is None:
        max_model_len = recipe.config.model.max_model_len or spec.max_positions
        num_kv_heads, num_layers = len(plan.kv_heads[tp_rank]), num_cached_layers(spec, plan, stage)
        kv_bytes = 2 * num_layers * num_kv_heads * spec.attention.head_dim * max_model_len * item_bytes
    return num_owned_elements(spec, plan, stage, tp_rank) * item_bytes + kv_bytes


def _item_bytes(recipe: MeshRecipe) -> int:
    name: str = recipe.config.model.dtype
    if name == "auto":
        config = read_json(Path(recipe.model_dir) / "config.json")
        name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return _ITEM_BYTES[name]


async def load_recipe(before: MeshRecipe, source: str) -> MeshRecipe:
    """``before`` with the weights of ``source``, fetched if need be.

    Raises OperationRefusedError if they cannot be had, or if requests in flight could not go on with them.
    """
    try:
        model_dir = await asyncio.to_thread(resolve_model, source)
        _, old = read_model_config(Path(before.model_dir))
        _, new = read_model_config(model_dir)
    except (OSError, ValueError, RuntimeError) as error:
        raise OperationRefusedError(f"{source}: {error}") from error
    if new.vocab_size != old.vocab_size or _tokenizer(model_dir) != _tokenizer(Path(before.model_dir)):
        raise OperationRefusedError(f"{source} has another tokenizer than the model that is served; serve it afresh")
    model = dataclasses.replace(before.config.model, source=source)
    return MeshRecipe(dataclasses.replace(before.config, model=model), str(model_dir))


def _tokenizer(model_dir: Path) -> bytes | None:
    path = model_dir / "tokenizer.json"
    return path.read_bytes() if path.exists() else None
