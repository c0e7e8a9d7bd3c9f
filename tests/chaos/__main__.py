"""``python -m tests.chaos``: a long run, with its figures at the end."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests.chaos.run import Options, run
from tests.chaos.tiny import save_tiny


def main(
    seconds: Annotated[float, typer.Option(help="How long faults are injected.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of the requests and of the faults.")] = 1,
    model: Annotated[str, typer.Option(help="As model.source; tiny makes a small random one.")] = "smollm2-135m",
    pace_s: Annotated[float, typer.Option(help="Between two faults, on average.")] = 8.0,
    num_cases: Annotated[int, typer.Option(help="Different requests.")] = 24,
    num_clients: Annotated[int, typer.Option(help="Streams at the same time.")] = 6,
    spares: Annotated[int, typer.Option(help="Warm spares.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 on CPUs: tensor ranks then stay two.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Append the figures to this file, a line.")] = None,
    log: Annotated[Path | None, typer.Option(help="Write what the server logged there.")] = None,
) -> None:
    """Kill, stop and scale at random under load; exit code 1 if a stream was lost or changed, or something is left."""
    with tempfile.TemporaryDirectory() as folder:
        source = str(save_tiny(Path(folder))) if model == "tiny" else model
        figures = run(Options(seed, seconds, source, pace_s, num_cases, num_clients, spares, dtype, log))
    print("\n".join(figures.lines()), flush=True)
    if json_file is not None:
        with json_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"model": model, "dtype": dtype, **figures.as_json()}) + "\n")
    raise typer.Exit(1 if figures.problems else 0)


if __name__ == "__main__":
    typer.run(main)
