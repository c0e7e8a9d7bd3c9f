"""Smaller shapes for a model that has to run on fewer hosts than it was configured for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from shardray.parallel.plan import make_plan
from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.parameters import model_sizes, num_owned_elements
from shardray.runtime.model.spec import DecoderSpec


def smaller_recipes(recipe: MeshRecipe) -> list[MeshRecipe]:
    """Every shape with fewer hosts, the best first: more hosts, then the smaller largest share of the weights.

    Shapes of equal merit go by fewer stages. Overrides of the split are dropped, since they fit the configured counts.
    """
    _, spec = read_model_config(Path(recipe.model_dir))
    shapes = [
        (tp_size, pp_size)
        for tp_size in range(1, recipe.size)
        for pp_size in range(1, min(recipe.size, spec.num_layers + 1))
        if tp_size * pp_size < recipe.size
    ]
    shapes.sort(key=lambda shape: (-shape[0] * shape[1], _largest_share(recipe, spec, *shape), shape[1]))
    return [_with_shape(recipe, *shape) for shape in shapes]


def _largest_share(recipe: MeshRecipe, spec: DecoderSpec, tp_size: int, pp_size: int) -> int:
    """Parameters on the rank that holds most."""
    plan = make_plan(model_sizes(spec), tp_size, pp_size, expert_parallel=recipe.config.parallel.expert_parallel)
    return max(num_owned_elements(spec, plan, *divmod(rank, tp_size)) for rank in range(tp_size * pp_size))


def _with_shape(recipe: MeshRecipe, tp_size: int, pp_size: int) -> MeshRecipe:
    parallel = dataclasses.replace(
        recipe.config.parallel,
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=pp_size,
        tensor_split=None,
        stage_layers=None,
    )
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, parallel=parallel))
