"""A process of its own in which chat templates are compiled and rendered: a program that imports nothing of ours.

Templates are foreign code. Jinja's immutable sandbox keeps them from files, and from attributes and calls that are not
theirs; it bounds neither time nor memory, and a few words of a template can ask for any amount of both. So the kernel
does: it refuses memory beyond the limit, and ends the process when one rendering has used up its processor time.

One JSON object a line comes in, {"source", "variables"}, and one goes out, {"text"} or {"error"}.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
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


def main(max_memory_bytes: int, max_processor_s: float, max_chars: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, max_processor_s)  # its signal, SIGPROF, ends the process
        answer = json.dumps(_answer(line, max_chars))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(line: bytes, max_chars: int) -> dict[str, str]:
    try:
        asked = json.loads(line)
        template = _compile(asked["source"])
    except jinja2.TemplateError as error:
        return {"error": f"the model's chat template is not valid: {error}"}
    except Exception as error:
        return {"error": f"the model's chat template cannot be compiled: {type(error).__name__} {error}"}
    try:
        return {"text": _render(template, asked["variables"], max_chars)}
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
    """Empty without variables: the template was to be compiled, no more."""
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


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
