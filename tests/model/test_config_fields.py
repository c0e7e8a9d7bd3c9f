"""Every field of every configuration is read, or known to make no difference; and the page that says so is fresh."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families import FAMILIES, read_model_config, unknown_fields
from shardray.runtime.model.families.family import Family
from shardray.runtime.model.families.irrelevant import IRRELEVANT
from tests.model.models_page import PAGE, configs, page
from tests.tiny_models import save_llama

# RoBERTa's positions begin behind the padding's id; a BERT that is a decoder is refused
READ_NEVERTHELESS = {"pad_token_id", "is_decoder"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_field_of_transformers_configuration_is_ignored_unawares(family: Family) -> None:
    variants = configs(family)
    assert variants, "no checkpoint of this family is tested"
    for name, config in variants.items():
        family.read_config(config)
        assert unknown_fields(config, family) == [], name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_no_family_needs_is_read_by_none(family: Family) -> None:
    """A field that one family reads may not be waved through for all others without a word."""
    for config in configs(family).values():
        family.read_config(config)
        assert config.read & IRRELEVANT.keys() <= READ_NEVERTHELESS


def test_a_field_that_nothing_is_known_of_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_llama(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_trick": 3, "old_trick": None}))
    with caplog.at_level(logging.WARNING):
        read_model_config(tmp_path)
    assert "ignored: new_trick" in caplog.text
    assert "old_trick" not in caplog.text


def test_defaults_and_replacements_are_not_fields_that_were_read() -> None:
    config = Config({"a": 1, "b": None, "c": 3})
    joined = {"a": 7, "d": 8} | config | {"c": 9}
    assert (joined["a"], joined.get("b", 5), joined["c"], joined["d"]) == (1, None, 9, 8)
    assert joined.get("e") is None
    assert {"a", "b"} <= config.read
    assert "c" not in config.read


def test_the_page_of_models_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.model.models_page"
