"""Chat messages as the text that a model was trained on, through the Jinja template that comes with it.

Templates are foreign code: they run in a process of their own, in Jinja's immutable sandbox, with bounds on processor
time, memory and the length of what they render. The names they may use are those that ``transformers`` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardray.runtime.model.folder import read_json, read_special_tokens
from shardray.runtime.model.sandbox import Sandbox, SandboxError

MAX_RENDERED_CHARS = 8_000_000  # beyond any context window
WORKER = Path(__file__).with_name("template_worker.py")
SHARED = Sandbox(WORKER, "the model's chat template")


class ChatTemplateError(ValueError):
    """A chat template that is missing, malformed, refuses the messages given to it, or takes too much."""


class ChatTemplate:
    """A template that compiles. Raises ChatTemplateError if ``source`` is not valid Jinja."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], sandbox: Sandbox = SHARED,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> None:  # fmt: skip
        """``max_chars``: the most that it may render."""
        self._question = {"source": source, "max_chars": max_chars}
        self._special_tokens = dict(special_tokens)  # bos_token, eos_token, ...: the text of each
        self._sandbox = sandbox
        self._ask(None)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, or None if it has none."""
        source = _find_source(folder)
        return None if source is None else cls(source, read_special_tokens(folder))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text, ending where the assistant's answer begins if ``add_generation_prompt``."""
        variables = {**self._special_tokens, "messages": list(messages), "tools": None, "documents": None}
        return self._ask({**variables, "add_generation_prompt": add_generation_prompt})

    def _ask(self, variables: Mapping[str, Any] | None) -> str:
        try:
            return self._sandbox.ask({**self._question, "variables": variables})
        except SandboxError as error:
            raise ChatTemplateError(str(error)) from None


def _find_source(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in source}
        source = by_name.get("default")
    return source if isinstance(source, str) else None
