"""``shardray scale``: other shard counts, while clients stream."""

from __future__ import annotations

from typing import Annotated

import typer

from shardray.runtime.cli import options

_UNCHANGED = "Left out: unchanged."


def command(
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", help=f"Ranks that share each layer. {_UNCHANGED}")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option("--pipeline-parallel-size", "-pp", help=f"Stages that the layers are divided over. {_UNCHANGED}"),
    ] = None,
    replicas: Annotated[int | None, typer.Option(help=f"Copies of the mesh. {_UNCHANGED}")] = None,
    tensor_split: Annotated[
        str | None, typer.Option(help="Relative share of each tensor rank, for unlike devices.", metavar="2,1,1")
    ] = None,
    stage_layers: Annotated[str | None, typer.Option(help="Number of layers of each stage.", metavar="10,12")] = None,
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
) -> None:
    """Run in another shape, or on another number of replicas.

    Streams go on; no request is dropped and no token changes. Ends when the new shape serves.
    """
    from shardray.runtime.cli.operation import follow
    from shardray.runtime.client import Client

    shares = options.numbers(tensor_split, "--tensor-split", float)
    layers = options.numbers(stage_layers, "--stage-layers", int)
    with Client(server) as client:
        steps = client.scale(
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            replicas=replicas,
            tensor_split=shares,
            stage_layers=layers,
        )
        follow(steps, as_json)
