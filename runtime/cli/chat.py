"""``shardray chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from shardray.runtime.cli import options

if TYPE_CHECKING:
    from shardray.runtime.client import Delta

_HINT = "Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D ends it."


def command(
    server: options.Server = options.DEFAULT_SERVER,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
) -> None:
    """Talk to the model."""
    from shardray.runtime.client import Client

    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with Client(server) as client:
        print(f"{client.model().model_id}. {_HINT}", file=sys.stderr)
        for line in _lines():
            if line == "/reset":
                messages = list(opening)
            elif line:
                messages.append({"role": "user", "content": line})
                deltas = client.stream(
                    messages, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
                )
                messages.append({"role": "assistant", "content": _print_answer(deltas)})


def _lines() -> Iterator[str]:
    """What the user writes, until Ctrl-D or Ctrl-C at the prompt."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and line editing
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return


def _print_answer(deltas: Iterator[Delta]) -> str:
    """The text so far, also when Ctrl-C ended it."""
    parts = []
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(deltas):  # type: ignore[type-var]
        for delta in deltas:
            parts.append(delta.text)
            print(delta.text, end="", flush=True)
    print()
    return "".join(parts)
