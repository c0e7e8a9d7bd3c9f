"""The small JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardray.runtime.model.spec import ModelConfigError, Pooling, PoolingMode


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty if there is no such file. Raises ModelConfigError if it is not a JSON object."""
    return read_object(path) if path.is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises ModelConfigError if there is none."""
    content = _read(path)
    if not isinstance(content, dict):
        raise ModelConfigError(f"{path}: is not a JSON object")
    return content


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{path}: cannot be read: {error}") from error


def read_eos_token_ids(folder: Path) -> frozenset[int]:
    """The ids that end a text: those of ``generation_config.json``, of ``config.json`` where that names none, or else
    the one of the tokenizer's ``eos_token``."""
    if found := read_token_ids(folder, "eos_token_id"):
        return frozenset(found)
    text = read_special_tokens(folder).get("eos_token")
    added = read_json(folder / "tokenizer.json").get("added_tokens") or ()
    return frozenset(token["id"] for token in added if token["content"] == text)


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the special tokens that ``tokenizer_config.json`` names, by ``bos_token``, ``eos_token`` ..."""
    config, tokens = read_json(folder / "tokenizer_config.json"), {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def read_token_ids(folder: Path, field: str) -> tuple[int, ...]:
    """What a field of ``generation_config.json``, or else of ``config.json``, names; empty if neither does."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get(field)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(int(token_id) for token_id in value)
    return ()


def read_suppressed_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that ``generation_config.json`` or ``config.json`` never lets a model generate."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name)
        words: list[list[int]] = config.get("bad_words_ids") or []
        found = [*(config.get("suppress_tokens") or []), *(word[0] for word in words if len(word) == 1)]
        if found:
            return tuple(found)
    return ()


def read_pooling(folder: Path) -> Pooling:
    """How a folder of sentence-transformers makes embeddings; the mean for one that does not say.

    Raises ModelConfigError for modules that would make others of them.
    """
    modules = _read_modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds not in _MODULES:
        raise ModelConfigError(
            f"{folder}: modules.json: {', '.join(kinds)}, one after the other, is not supported "
            "(only Transformer, Pooling and perhaps Normalize is)"
        )
    normalize = "Normalize" in kinds
    config = next((read_json(folder / path / "config.json") for kind, path in modules if kind == "Pooling"), {})
    wanted = [str(config["pooling_mode"])] if "pooling_mode" in config else [
        name.removeprefix("pooling_mode_") for name, value in config.items() if value is True and "_mode_" in name
    ]  # fmt: skip
    if not wanted:
        return Pooling(normalize=normalize)
    if len(wanted) > 1 or wanted[0] not in _POOLING_MODES:
        known = ", ".join(_POOLING_MODES)
        raise ModelConfigError(f"{folder}: pooling by {' and '.join(wanted)} is not supported; one of {known} is")
    return Pooling(_POOLING_MODES[wanted[0]], normalize)


def read_max_text_len(folder: Path) -> int | None:
    """Tokens at which sentence-transformers cuts texts for this model; None if its folder does not say."""
    value = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return value if isinstance(value, int) else None


_MODULES = [[], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]]
_POOLING_MODES: dict[str, PoolingMode] = {
    "mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last",
}  # fmt: skip


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """(kind, folder) of the modules that sentence-transformers runs one after the other"""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    modules = _read(path)
    try:
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        raise ModelConfigError(f"{path}: is not a list of modules, each with a type and a path") from error
