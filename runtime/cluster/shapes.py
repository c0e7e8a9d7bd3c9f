"""Smaller shapes for a model that has to run on fewer hosts than it was configured for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.engine.shapes import cut, merit, shapes_within
from shardray.runtime.model.families import read_model_config


def smaller_recipes(recipe: MeshRecipe) -> list[MeshRecipe]:
    """Every shape with fewer hosts, the best first: more hosts, then the smaller largest share of the weights.

    Shapes of equal merit go by fewer stages. Overrides of the split are dropped, since they fit the configured counts.
    """
    _, spec = read_model_config(Path(recipe.model_dir))
    by_experts = recipe.config.parallel.expert_parallel

    def key(shape: tuple[int, int]) -> tuple[int, int, int]:
        return merit(spec, cut(spec, *shape, by_experts))

    return [_with_shape(recipe, *shape) for shape in sorted(shapes_within(recipe.size - 1, spec.num_layers), key=key)]


def _with_shape(recipe: MeshRecipe, tp_size: int, pp_size: int) -> MeshRecipe:
    parallel = dataclasses.replace(
        recipe.config.parallel,
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=pp_size,
        tensor_split=None,
        stage_layers=None,
    )
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, parallel=parallel))
