"""YAML file plus ``key=value`` overrides → ``Config``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from shardray.runtime.config.errors import ConfigError, explain
from shardray.runtime.config.settings import Config

_OVERRIDES = "--set"


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


@functools.cache
def _schema() -> dict[str, Any]:
    return _adapter().json_schema()


def config_schema() -> dict[str, Any]:
    """JSON Schema of the settings file, for editors and validators."""
    return {**copy.deepcopy(_schema()), "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "shardray"}


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` (None: no file), apply overrides such as ``parallel.replicas=2``, validate.

    Override values are YAML, so ``null``, ``[2, 1]`` and ``2GiB`` mean what they mean in the file. An override wins
    over the file, a later override over an earlier one. Raises ConfigError with one line for each problem.
    """
    source = str(path) if path is not None else _OVERRIDES
    settings = _read_file(path) if path is not None else {}
    for override in overrides:
        _apply_override(settings, override)
    # A section whose keys are all commented out reads as null; it means the defaults.
    sections = {
        key: {} if value is None and key in _schema()["properties"] else value for key, value in settings.items()
    }
    try:
        return _adapter().validate_python(sections)
    except ValidationError as error:
        raise ConfigError(_explain_all(error), source) from None


def _explain_all(error: ValidationError) -> list[str]:
    """One line for each place; a union reports a place once per branch, and the branches' lines are the same."""
    return list(dict.fromkeys(explain(details, _schema()) for details in error.errors()))


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses a key given twice, where YAML itself lets the last one win without a word."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(problem=f"line {line}: key {key!r} is given twice; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _parse_yaml(text: str, source: str, where: str = "") -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError([f"{where}{line}{error.problem}"], source) from None
    except yaml.YAMLError as error:
        raise ConfigError([where + " ".join(str(error).split())], source) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError([f"cannot be read: {reason}"], str(path)) from None
    settings = _parse_yaml(text, str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        sections = ", ".join(_schema()["properties"])
        raise ConfigError([f"must be a mapping with sections {sections}"], str(path))
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        example = "parallel.tensor_parallel_size=2"
        raise ConfigError([f"{override!r} is not key=value, for example {example}"], _OVERRIDES)
    value = _parse_yaml(text, _OVERRIDES, where=f"{path}: ")
    section = settings
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            parent = ".".join(keys[:depth])
            raise ConfigError([f"{path}: {parent} holds {section!r} and has no keys below it"], _OVERRIDES)
    section[keys[-1]] = value
