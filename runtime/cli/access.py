"""Options with which a command shows a server who it is. Tokens come from files or the environment, never from argv."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

_File = str | None
# Each option is another way to set the environment variable of its name; `Client` reads those.
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "tls": (bool, typer.Option("--tls", help="Use TLS, with the authorities that this machine trusts.")),
    "ca": (_File, typer.Option(help="Use TLS; PEM file of the server's authority.", metavar="FILE")),
    "cert": (_File, typer.Option(help="PEM file of a certificate to show the server.", metavar="FILE")),
    "key": (_File, typer.Option(help="PEM file of its private key.", metavar="FILE")),
    "token_file": (_File, typer.Option(help="File with a token; or SHARDRAY_TOKEN.", metavar="FILE")),
    "plaintext_token": (
        bool,
        typer.Option("--plaintext-token", help="Send the token to another machine without TLS."),
    ),
}


def connecting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with these options, if it connects to a server; else as it is."""
    signature = inspect.signature(command, eval_str=True)
    if "server" not in signature.parameters:
        return command

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in _OPTIONS}
        with _environment(given):
            return command(**arguments)

    added = [_parameter(name, kind, option) for name, (kind, option) in _OPTIONS.items()]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in signature.parameters.values()]
    wrapped.__signature__ = signature.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in [*parameters, *added]}
    return wrapped


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    default = False if kind is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


@contextmanager
def _environment(given: dict[str, str | bool | None]) -> Iterator[None]:
    """What is not given stays as the environment has it; a file with a token counts more than a token there."""
    before = dict(os.environ)
    os.environ.update({f"SHARDRAY_{name.upper()}": str(value) for name, value in given.items() if value})
    try:
        yield
    finally:
        for name in given:
            key = f"SHARDRAY_{name.upper()}"
            os.environ.pop(key, None)
            if key in before:
                os.environ[key] = before[key]
