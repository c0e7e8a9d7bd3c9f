"""Compiles and renders chat templates in a sandbox, see ``sandbox_main.py``.

Templates are foreign code. Jinja's immutable sandbox keeps them from files, and from attributes and calls that are not
theirs; it bounds neither time nor memory, and a few words of a template can ask for any amount of both.
"""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _RefusedError(Exception):
    """The template does not take the messages, or renders too much of them."""


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}``, which marks the assistant's words for training: its body, rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def answer(question: dict[str, Any]) -> dict[str, str]:
    """To {"source", "variables", "max_chars"}; without variables the template is compiled, no more."""
    try:
        template = _compile(question["source"])
    except jinja2.TemplateError as error:
        return {"error": f"the model's chat template is not valid: {error}"}
    except Exception as error:
        return {"error": f"the model's chat template cannot be compiled: {type(error).__name__} {error}"}
    try:
        return {"text": _render(template, question["variables"], question["max_chars"])}
    except _RefusedError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever the template's own code raises
        return {"error": f"the model's chat template failed: {str(error) or type(error).__name__}"}


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> jinja2.Template:
    extensions = ["jinja2.ext.loopcontrols", _GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _render(template: jinja2.Template, variables: dict[str, Any] | None, max_chars: int) -> str:
    parts: list[str] = []
    num_chars = 0
    for part in template.generate(**variables) if variables is not None else ():
        num_chars += len(part)
        if num_chars > max_chars:
            raise _RefusedError(f"the chat template rendered more than {max_chars} characters")
        parts.append(part)
    return "".join(parts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With the arguments that transformers' has; Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(f"the model's chat template refused the messages: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
