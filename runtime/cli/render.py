"""``shardray render``: a serving file as what another system deploys."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shardray.runtime.cli import options


class Target(StrEnum):
    """What is rendered for."""

    KUBERAY = "kuberay"


def command(
    target: Annotated[Target, typer.Argument(help="kuberay: a RayCluster with a front before it.")],
    config: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    name: Annotated[str, typer.Option(help="Of the fleet; every object's name begins with it.")] = "shardray",
    namespace: Annotated[str | None, typer.Option(help="Left out: the one that kubectl uses.")] = None,
    image: Annotated[
        str | None, typer.Option(help="Built from deploy/Containerfile; left out: shardray:VERSION-cuda or -cpu.")
    ] = None,
    hosts_per_pod: Annotated[
        int | None, typer.Option(min=1, help="Left out: one tensor group, 8 at most, as far as the placement allows.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a worker pod, e.g. 64GiB; left out: from the plan of the model, or per GPU.")
    ] = None,
    model_claim: Annotated[
        str | None, typer.Option(help="A ReadWriteMany claim for weights, at /models in every pod.")
    ] = None,
    overrides: options.Overrides = None,
) -> None:
    """Print the manifests of a fleet, for `kubectl apply -f -`.

    Nothing is contacted and no secret is read: manifests name the secrets that they need, and their first lines list
    them.
    """
    from shardray.runtime.config.units import parse_bytes
    from shardray.runtime.deploy.kuberay import render
    from shardray.runtime.deploy.names import RenderOptions

    try:
        memory_bytes = None if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None
    asked = RenderOptions(
        name=name,
        namespace=namespace,
        image=image,
        hosts_per_pod=hosts_per_pod,
        memory_bytes=memory_bytes,
        model_claim=model_claim,
        overrides=tuple(overrides or ()),
    )
    assert target is Target.KUBERAY
    typer.echo(render(config, asked), nl=False)
