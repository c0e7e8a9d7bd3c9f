"""The commands under one roof, and what their errors look like: one line with the fix, and an exit code.

Command modules import what they need inside their functions, so that ``shardray --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from shardray import __version__
from shardray.runtime.cli import (
    chat,
    demo,
    doctor,
    drain,
    embed,
    generate,
    plan,
    pull,
    quantize,
    reload,
    render,
    restart,
    scale,
    schema,
    serve,
    status,
    trace,
)
from shardray.runtime.cli.access import connecting

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="shardray",
    help="Serves one decoder from many GPUs: Ray places the shards, NCCL joins them, gRPC streams the tokens.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    pull,
    quantize,
    plan,
    serve,
    generate,
    chat,
    embed,
    status,
    scale,
    reload,
    restart,
    drain,
    schema,
    demo,
    doctor,
    trace,
    render,
):
    app.command(module.__name__.rpartition(".")[2])(connecting(module.command))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        typer.echo(f"shardray {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command that ``sys.argv`` names and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code: 0, 1 (it failed), 2 (bad input), 130 (Ctrl-C)."""
    try:
        code = app(args=list(arguments), prog_name="shardray", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return _fail(f"{error.format_message()} (shardray --help)", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _fail(*_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    """Errors of our own say all there is to say; of others, also say how to see more."""
    if type(error).__module__.startswith("shardray."):
        is_input = isinstance(error, ValueError) or getattr(error, "code", None) == "INVALID_ARGUMENT"
        return str(error), EXIT_BAD_INPUT if is_input else EXIT_FAILED
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", EXIT_FAILED
    what = " ".join(str(error).split())
    return f"{type(error).__name__}: {what} (shardray --debug ... shows the traceback)", EXIT_FAILED


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code
