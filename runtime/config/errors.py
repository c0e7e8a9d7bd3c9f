"""Settings problems in the operator's words: which key, which value, what would be accepted, the nearest known key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import ErrorDetails

Schema = dict[str, Any]


class ConfigError(ValueError):
    """Settings that cannot be honoured; ``problems`` has one line for each."""

    def __init__(self, problems: Sequence[str], source: str) -> None:
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))
        self.problems = tuple(problems)
        self.source = source


def explain(error: ErrorDetails, schema: Schema) -> str:
    """One line for one pydantic error; ``schema`` is the JSON Schema of all settings."""
    location = [part for part in error["loc"] if not _is_union_branch(part)]
    path = _dotted(location)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{path}: unknown key (value {_shown(error['input'])}); {_nearest(location, schema)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{path}: missing; give {accepts(_subschema(location, schema), schema)}"
    if error["type"] == "cross_field":
        context = error["ctx"]
        key = f"{path}.{context['key']}".lstrip(".")  # a check across sections has no path of its own
        return f"{key}: {_shown(context['value'])} {context['message']}"
    return f"{path}: {_shown(error['input'])} is not accepted; give {accepts(_subschema(location, schema), schema)}"


def accepts(field: Schema, schema: Schema) -> str:
    """What a field takes, in words, from its JSON Schema."""
    field = _resolve(field, schema)
    if "x-accepts" in field:
        return str(field["x-accepts"])
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(accepts(option, schema) for option in field["anyOf"])
    if field.get("type") == "null":
        return f"null ({field['description']})" if "description" in field else "null"
    if field.get("type") == "array":
        return f"a list, each entry {accepts(field['items'], schema)}"
    if field.get("type") == "object":
        return "a mapping with keys from " + ", ".join(field.get("properties", ()))
    names = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a text"}
    return names.get(field.get("type", ""), "another value") + _bounds(field)


def known_keys(schema: Schema, prefix: str = "") -> Iterator[str]:
    """Every key that settings have, dotted: ``parallel``, ``parallel.tensor_parallel_size`` ..."""
    yield from _walk(schema, schema, prefix)


def _walk(field: Schema, schema: Schema, prefix: str) -> Iterator[str]:
    for option in _options(field, schema):
        for name, child in option.get("properties", {}).items():
            yield prefix + name
            yield from _walk(child, schema, f"{prefix}{name}.")


def _nearest(location: Sequence[str | int], schema: Schema) -> str:
    keys = list(known_keys(schema))
    section, name = _dotted(location[:-1]), str(location[-1])
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in siblings], n=1)
    if close:
        return f"did you mean {section + '.' if section else ''}{close[0]}?"
    elsewhere = difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.75)
    if elsewhere:
        return f"did you mean {by_leaf[elsewhere[0]]}?"
    return "known keys here: " + ", ".join(key.rpartition(".")[2] for key in siblings)


def _subschema(location: Sequence[str | int], schema: Schema) -> Schema:
    field = schema
    for part in location:
        options = _options(field, schema)
        if isinstance(part, int):
            field = next((option["items"] for option in options if "items" in option), {})
        else:
            field = next((option["properties"][part] for option in options if part in option.get("properties", ())), {})
    return field


def _options(field: Schema, schema: Schema) -> list[Schema]:
    """The field itself, or what it may be one of."""
    field = _resolve(field, schema)
    return [field, *(_resolve(option, schema) for option in field.get("anyOf", ()))]


def _resolve(field: Schema, schema: Schema) -> Schema:
    """Follow a ``$ref``, keeping what stands beside it."""
    if "$ref" not in field:
        return field
    target: Schema = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return {**target, **{key: value for key, value in field.items() if key != "$ref"}}


def _bounds(field: Schema) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {field[key]:g}" for key, word in words.items() if key in field]
    if field.get("minLength"):
        bounds.append("that is not empty")
    return " " + " and ".join(bounds) if bounds else ""


def _is_union_branch(part: str | int) -> bool:
    """pydantic adds the branch of a union (``function-before[...]``, ``tuple[...]``) to the path."""
    return isinstance(part, str) and ("[" in part or part == "none")


def _dotted(location: Sequence[str | int]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f"{'.' if path else ''}{part}"
    return path


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
