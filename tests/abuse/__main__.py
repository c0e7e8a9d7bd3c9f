"""``python -m tests.abuse``: load and abuse of a served tiny model, with figures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.abuse.fleet import AbusedFleet
from tests.abuse.scenarios import garbage, idle_connections, overload, slow_readers, vanishing


def main(
    seconds: Annotated[
        float, typer.Option(help="How long the fleet is overloaded, and how long garbage is sent.")
    ] = 60.0,
    clients: Annotated[int, typer.Option(help="How many vanish.")] = 1000,
    connections: Annotated[int, typer.Option(help="How many are idle.")] = 10_000,
    hosts: Annotated[int, typer.Option(help="Tensor ranks.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="overload, vanishing, slow, idle, garbage; all if unset.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Do all of it to one fleet, one after the other; exit code 1 if it keeps anything or complains in its log."""
    attacks: dict[str, Callable[[AbusedFleet], dict[str, Any]]] = {
        "overload": lambda fleet: overload(fleet, seconds),
        "vanishing": lambda fleet: vanishing(fleet, clients),
        "slow": slow_readers,
        "idle": lambda fleet: idle_connections(fleet, connections),
        "garbage": lambda fleet: garbage(fleet, seconds),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        fleet = AbusedFleet(Path(folder), hosts)
        try:
            for name in only or attacks:
                found[name] = attacks[name](fleet)
                if not as_json:
                    print("\n".join([name, *_lines(found[name], "  ")]), flush=True)
        finally:
            wrong = [*fleet.stop(), *fleet.complaints()]
    wrong += [f"{name} left {what}" for name, figures in found.items() for what in figures.get("left", [])]
    print(json.dumps({**found, "wrong": wrong}) if as_json else f"wrong: {wrong or 'nothing'}")
    raise typer.Exit(1 if wrong else 0)


def _lines(figures: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:32} {value}")
    return lines


if __name__ == "__main__":
    typer.run(main)
