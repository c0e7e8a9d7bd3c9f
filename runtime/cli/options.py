"""Options that more than one command takes. What is left out is the server's default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

T = TypeVar("T")

DEFAULT_SERVER = "127.0.0.1:50051"

ConfigFile = Annotated[
    Path | None, typer.Argument(help="A YAML file; may be left out if --set says all.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting: parallel.tensor_parallel_size=3")
]
Server = Annotated[
    str, typer.Option("--server", "-s", help="Address of a running `shardray serve`.", metavar="HOST:PORT")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the smallest set of tokens that reaches this probability.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text; left out: another one each time.")]
Timeout = Annotated[float | None, typer.Option("--timeout-s", help="Give up after this many seconds.")]


def text_or_stdin(text: str) -> str:
    """``-`` stands for what is piped in."""
    return sys.stdin.read() if text == "-" else text


def text_or_file(option: str, text: str | None) -> str | None:
    """``@FILE`` stands for what is in it. Raises typer.BadParameter."""
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {text[1:]}: {error}", param_hint=option) from None


def numbers(text: str | None, option: str, kind: Callable[[str], T]) -> list[T] | None:
    """``2,1,1`` as numbers. Raises typer.BadParameter."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers, for example 2,1,1", param_hint=option) from None
