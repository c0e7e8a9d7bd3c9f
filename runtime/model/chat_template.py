"""Chat messages as the text that a model was trained on, through the Jinja template that comes with it.

Templates are foreign code: they run in a process of their own, in Jinja's immutable sandbox, with bounds on processor
time, memory and the length of what they render. The names they may use are those that ``transformers`` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shardray.runtime.model.folder import read_json, read_special_tokens
from shardray.runtime.model.template_process import SHARED, TemplateError, TemplateProcess


class ChatTemplateError(ValueError):
    """A chat template that is missing, malformed, refuses the messages given to it, or takes too much."""


class ChatTemplate:
    """A template that compiles. Raises ChatTemplateError if ``source`` is not valid Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], process: TemplateProcess = SHARED) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)  # bos_token, eos_token, ...: the text of each
        self._process = process
        try:
            process.compile(source)
        except TemplateError as error:
            raise ChatTemplateError(str(error)) from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, or None if it has none."""
        source = _find_source(folder)
        return None if source is None else cls(source, read_special_tokens(folder))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text, ending where the assistant's answer begins if ``add_generation_prompt``."""
        variables = {**self._special_tokens, "messages": list(messages), "tools": None, "documents": None}
        try:
            return self._process.render(self._source, {**variables, "add_generation_prompt": add_generation_prompt})
        except TemplateError as error:
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
