"""Whether the cluster can hold a shape, told before anything is touched: planning, room for hosts, memory."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from shardray.parallel.plan import PlanError
from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.cluster.replica_set import ReplicaSet
from shardray.runtime.driver.operations import OperationRefusedError
from shardray.runtime.engine.memory import rank_memory
from shardray.runtime.engine.served import read_served
from shardray.runtime.engine.shapes import cut_as_configured
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.spec import ModelConfigError

_GIB = 1 << 30


async def check_room(fleet: ReplicaSet, recipe: MeshRecipe, num_replicas: int) -> None:
    """Raises OperationRefusedError with numbers if ``num_replicas`` meshes of ``recipe`` cannot be had."""
    try:
        needs = needed_bytes(recipe, fleet.is_on_gpus)
    except (PlanError, ModelConfigError) as error:
        raise OperationRefusedError(str(error)) from error
    if (reason := await fleet.shortage_of(recipe.size * num_replicas)) is not None:
        raise OperationRefusedError(reason)
    utilization = recipe.config.engine.memory_utilization
    offer = Offer(fleet.is_on_gpus, [int(one * utilization) for one in await fleet.memory_of_devices()])
    if (reason := lack_of_memory(needs, num_replicas, offer)) is not None:
        raise OperationRefusedError(reason)


@dataclasses.dataclass(frozen=True)
class Offer:
    """Bytes that may be used of each GPU that the fleet knows, or of each node for hosts on CPUs."""

    is_gpus: bool
    num_bytes: list[int]


def lack_of_memory(needs: list[int], num_replicas: int, offer: Offer) -> str | None:
    """Why meshes whose ranks need ``needs`` bytes do not fit; None if they do, or if nothing is known of what there is.

    A rank has a GPU of its own, of which the largest counts that is known; ranks on CPUs share their nodes' memory.
    """
    if not offer.num_bytes:
        return None
    largest, most, total = max(needs), max(offer.num_bytes), sum(offer.num_bytes)
    if largest > most:
        return (
            f"rank {needs.index(largest)} needs {largest / _GIB:.2f} GiB for its weights and one sequence, "
            f"a {'GPU' if offer.is_gpus else 'host'} has {most / _GIB:.2f} GiB; use more shards"
        )
    if not offer.is_gpus and sum(needs) * num_replicas > total:
        return (
            f"{num_replicas} × {len(needs)} shards need {sum(needs) * num_replicas / _GIB:.2f} GiB for weights and a "
            f"sequence each, the hosts have {total / _GIB:.2f} GiB in all; use fewer replicas"
        )
    return None


def needed_bytes(recipe: MeshRecipe, on_gpus: bool) -> list[int]:
    """Bytes of each rank: weights, a step, and the pages that are granted or those of one sequence."""
    config = recipe.config
    served = read_served(Path(recipe.model_dir), config.model.dtype, config.model.max_model_len, config.engine)
    plan = cut_as_configured(served.spec, config.parallel)
    packs = not on_gpus and served.item_bytes == 2  # to ask this machine would not tell of the hosts'
    ranks = (rank_memory(served, plan, *divmod(rank, plan.tp_size), packs) for rank in range(recipe.size))
    return [
        memory.loaded_bytes + memory.step_bytes + (config.engine.kv_memory_bytes or memory.sequence_bytes)
        for memory in ranks
    ]


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
    model = dataclasses.replace(before.config.model, source=source, revision=None)  # that was the old source's
    return MeshRecipe(dataclasses.replace(before.config, model=model), str(model_dir))


def _tokenizer(model_dir: Path) -> bytes | None:
    path = model_dir / "tokenizer.json"
    return path.read_bytes() if path.exists() else None
