"""Chat messages as the text that a model was trained on, through the Jinja template that comes with it.

Templates are foreign code: they run in Jinja's immutable sandbox, and the length of what they render is bounded.
The names they may use are those that ``transformers`` gives them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shardray.runtime.model.folder import read_json

MAX_RENDERED_CHARS = 8_000_000  # beyond any context window


class ChatTemplateError(ValueError):
    """A chat template that is missing, malformed, or refuses the messages given to it."""


class ChatTemplate:
    """A compiled template. Raises ChatTemplateError if ``source`` is not valid Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)  # bos_token, eos_token, ...: the text of each
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, or None if it has none."""
        config = read_json(folder / "tokenizer_config.json")
        source = _find_source(folder, config)
        return None if source is None else cls(source, _special_tokens(config))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text, ending where the assistant's answer begins if ``add_generation_prompt``."""
        variables = {**self._special_tokens, "messages": list(messages), "tools": None, "documents": None}
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(**variables, add_generation_prompt=add_generation_prompt):
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS:
                    raise ChatTemplateError(f"the chat template rendered more than {MAX_RENDERED_CHARS} characters")
                parts.append(part)
        except ChatTemplateError:
            raise
        except Exception as error:  # whatever the template's own code raises
            raise ChatTemplateError(f"the model's chat template failed: {error}") from error
        return "".join(parts)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}``, which marks the assistant's words for training: its body, rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    extensions = ["jinja2.ext.loopcontrols", _GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes for HTML


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(f"the model's chat template refused the messages: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _find_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in source}
        source = by_name.get("default")
    return source if isinstance(source, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens
