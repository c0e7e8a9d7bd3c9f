"""Every field of every configuration is read, or known to make no difference; and the page that says so is fresh."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families import FAMILIES, read_model_config, unknown_fields
from shardray.runtime.model.families.family import Family
from shardray.runtime.model.families.gemma import GEMMA3
from shardray.runtime.model.families.irrelevant import IRRELEVANT
from shardray.runtime.model.families.modernbert import MODERNBERT
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError
from tests.model.models_page import PAGE, configs, page
from tests.tiny_models import save_llama

# RoBERTa's positions begin behind the padding's id; a BERT that is a decoder is refused
READ_NEVERTHELESS = {"pad_token_id", "is_decoder"}
# A checkpoint whose tensors do not fit what these say is refused as it is loaded
TOLD_BY_TENSORS = {
    "ffn_dim", "first_k_dense_replace", "head_dim", "hidden_dim", "intermediate_size", "n_shared_experts",
    "num_key_value_heads", "q_lora_rank",
}  # fmt: skip


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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_absent_field_and_a_null_one_mean_what_they_mean_to_transformers(family: Family) -> None:
    """Or they are refused."""
    for name, config in configs(family).items():
        for field in config.keys() - {"model_type", *TOLD_BY_TENSORS}:
            rest = {other: value for other, value in config.items() if other != field}
            for fields in (rest, rest | {field: None}):
                if (whole := fill_in(fields)) is not None:
                    assert read(family, fields) in (read(family, whole), None), (name, field, field in fields)


PLAIN = {"rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize("family", [GEMMA3, MODERNBERT], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
        {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 5e5}}},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
        {"global_rope_theta": 5e5, "local_rope_theta": 2e4, "rope_scaling": LINEAR},
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}, "rope_scaling": LINEAR},
    ],
)
def test_rotary_positions_of_each_kind_of_layer_are_those_of_transformers(family: Family, rope: dict[str, Any]) -> None:
    for config in configs(family).values():
        fields = {name: value for name, value in config.items() if name != "rope_parameters"} | rope
        whole = fill_in(fields)
        assert whole is not None
        assert read(family, fields) == read(family, whole) is not None


def fill_in(fields: dict[str, Any]) -> dict[str, Any] | None:
    """With the defaults of transformers; None if it does not take them."""
    try:
        config = CONFIG_MAPPING[fields["model_type"]](**json.loads(json.dumps(fields)))  # it writes into them
    except Exception:  # of many kinds
        return None
    filled: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return filled


def read(family: Family, fields: dict[str, Any]) -> DecoderSpec | None:
    """None if it is refused."""
    try:
        return family.read_config(Config(fields))
    except ModelConfigError:
        return None


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
