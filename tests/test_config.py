"""Settings: what is accepted, and what an operator reads when something is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.config import Config, ConfigError, ParallelSettings, config_schema, load_config, parse_bytes
from shardray.runtime.config.errors import known_keys
from shardray.runtime.config.units import parse_listen

MODEL = "model.source=smollm2-135m"


def problems(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [MODEL, *overrides])
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    path = folder / "serving.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_source_is_all_that_is_needed() -> None:
    config = load_config(None, [MODEL])
    assert config.model.source == "smollm2-135m"
    assert (config.parallel.tensor_parallel_size, config.parallel.num_hosts) == (1, 1)
    assert config.grpc.listen == "127.0.0.1:50051"


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {source: a}\nparallel: {tensor_parallel_size: 2, replicas: 3}\n")
    config = load_config(path, ["parallel.tensor_parallel_size=4", "parallel.tensor_parallel_size=5"])
    assert config.parallel == ParallelSettings(tensor_parallel_size=5, replicas=3)


def test_override_values_are_yaml() -> None:
    overrides = ["parallel.tensor_parallel_size=3", "parallel.tensor_split=[2, 1, 1]", "engine.kv_memory_bytes=2GiB"]
    config = load_config(None, [MODEL, *overrides, "model.max_model_len=null", "grpc.reflection=false"])
    assert config.parallel.tensor_split == (2.0, 1.0, 1.0)
    assert config.engine.kv_memory_bytes == 2 * 1024**3
    assert config.model.max_model_len is None
    assert config.grpc.reflection is False


def test_a_section_without_keys_means_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {source: a}\nengine:\n  # block_size: 32\n")
    assert load_config(path).engine.block_size == 16


def test_settings_cannot_be_changed_after_they_were_made() -> None:
    config = load_config(None, [MODEL])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.parallel.replicas = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "parallel.tensor_paralel_size=2",
            "parallel.tensor_paralel_size: unknown key (value 2); did you mean parallel.tensor_parallel_size?",
        ),
        ("max_num_seqs=2", "max_num_seqs: unknown key (value 2); did you mean engine.max_num_seqs?"),
        ("paralel.replicas=2", 'paralel: unknown key (value {"replicas": 2}); did you mean parallel?'),
        (
            "ray.zebra=1",
            "ray.zebra: unknown key (value 1); known keys here: "
            "address, placement_strategy, form_timeout_s, namespace, cpus_per_host",
        ),
        ("parallel.replicas=0", "parallel.replicas: 0 is not accepted; give an integer of at least 1"),
        ("parallel.replicas=2.0", "parallel.replicas: 2.0 is not accepted; give an integer of at least 1"),
        ("parallel.replicas='2'", 'parallel.replicas: "2" is not accepted; give an integer of at least 1'),
        ("parallel.replicas=yes", "parallel.replicas: true is not accepted; give an integer of at least 1"),
        ("model.dtype=int3", 'model.dtype: "int3" is not accepted; give one of auto, float32, bfloat16, float16'),
        (
            "engine.memory_utilization=1.5",
            "engine.memory_utilization: 1.5 is not accepted; give a number above 0 and at most 1",
        ),
        ("engine.step_timeout_s=.inf", "engine.step_timeout_s: Infinity is not accepted; give a number above 0"),
        (
            "engine.kv_memory_bytes=2Gx",
            'engine.kv_memory_bytes: "2Gx" is not accepted; '
            "give a number of bytes or a size such as 512MiB or 2GiB or null",
        ),
        (
            "grpc.listen=50051",
            'grpc.listen: 50051 is not accepted; give host:port such as "127.0.0.1:50051" (port 0 takes a free one)',
        ),
        ("ray.address=ray:/x", 'ray.address: "ray:/x" is not accepted; give local, auto, host:port or ray://host:port'),
        (
            "parallel.stage_layers=[]",
            "parallel.stage_layers: [] has 0 entries, but pipeline_parallel_size is 1; give one count for each stage",
        ),
        (
            "parallel.tensor_split=[2, 1]",
            "parallel.tensor_split: [2.0, 1.0] has 2 entries, but tensor_parallel_size is 1; "
            "give one share for each tensor rank",
        ),
        (
            "parallel.tensor_split=[0]",
            "parallel.tensor_split[0]: 0 is not accepted; give a number above 0",
        ),
        (
            "limits.default_deadline_s=7200",
            "limits.default_deadline_s: 7200.0 exceeds max_deadline_s 3600; lower it or raise max_deadline_s",
        ),
        (
            "engine.max_num_batched_tokens=64",
            "engine.max_num_batched_tokens: 64 has to exceed max_num_seqs 64, so that a step full of decodes has room "
            "for a prompt; raise it or lower max_num_seqs",
        ),
        (
            "autoscaling={min_replicas: 3, max_replicas: 2}",
            "autoscaling.min_replicas: 3 exceeds max_replicas 2; lower it or raise max_replicas",
        ),
        ("model.source.name=x", "model.source.name: model.source holds 'smollm2-135m' and has no keys below it"),
        ("parallel", "'parallel' is not key=value, for example parallel.tensor_parallel_size=2"),
        ("=2", "'=2' is not key=value, for example parallel.tensor_parallel_size=2"),
        ("ray={address: auto, address: local}", "ray: line 1: key 'address' is given twice; keep one"),
    ],
)
def test_a_problem_names_key_value_and_what_would_be_accepted(override: str, expected: str) -> None:
    assert problems(override) == (expected,)


def test_the_port_for_gateways_is_as_closed_as_the_public_one_or_says_so() -> None:
    assert problems("gateway.listen=10.0.0.1:50061") == (
        'gateway.listen: "10.0.0.1:50061" is reached by other machines and lets everyone in; listen on 127.0.0.1 '
        "beside the gateway, or say gateway.allow_unauthenticated: true on a network that only the gateway reaches",
    )
    for good in ("gateway.allow_unauthenticated=true", "grpc.auth.tokens=tokens"):
        assert load_config(None, [MODEL, "gateway.listen=10.0.0.1:50061", good]).gateway.listen == "10.0.0.1:50061"


def test_an_address_that_is_told_to_gateways_is_one_that_they_can_connect_to() -> None:
    settings = "gateway={listen: '0.0.0.0:50061', allow_unauthenticated: true, discovery_file: workers.json}"
    (problem,) = problems(settings)
    assert problem == (
        'gateway.listen: "0.0.0.0:50061" is no address that a gateway can connect to; set gateway.advertise_host to one'
    )
    assert load_config(None, [MODEL, settings, "gateway.advertise_host=10.0.0.1"]).gateway.advertise_host == "10.0.0.1"


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "10.0.0.1:1", "node-1.lan:0"])
def test_who_lets_everyone_in_has_to_say_so(listen: str) -> None:
    (problem,) = problems(f"grpc.listen='{listen}'", "grpc.tls={cert: c.pem, key: k.pem}")
    assert problem == (
        f'grpc.listen: "{listen}" is reached by other machines and lets everyone in; set grpc.auth.tokens or '
        "grpc.tls.client_ca, or listen on 127.0.0.1, or say grpc.allow_unauthenticated: true"
    )
    for closed in (
        "grpc.auth.tokens=tokens",
        "grpc.tls={cert: c.pem, key: k.pem, client_ca: ca.pem}",
        "grpc.allow_unauthenticated=true",
    ):
        assert load_config(None, [MODEL, f"grpc.listen='{listen}'", closed]).grpc.listen == listen


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "localhost:1"])
def test_this_machine_alone_needs_no_tokens(listen: str) -> None:
    assert not load_config(None, [MODEL, f"grpc.listen='{listen}'"]).grpc.asks_who_calls


def test_reflection_is_off_where_callers_are_asked_unless_it_is_asked_for() -> None:
    tokens = "grpc.auth.tokens=tokens"
    assert load_config(None, [MODEL]).grpc.reflects
    assert not load_config(None, [MODEL, tokens]).grpc.reflects
    assert load_config(None, [MODEL, tokens, "grpc.reflection=true"]).grpc.reflects


def test_a_certificate_needs_its_key() -> None:
    assert problems("grpc.tls={cert: server.pem}") == ("grpc.tls.key: missing; give a text that is not empty",)


def test_certificates_are_three_absolute_paths() -> None:
    files = "{ca: /etc/shardray/ca.pem, cert: /etc/shardray/cert.pem, key: /etc/shardray/key.pem}"
    tls = load_config(None, [MODEL, f"cluster.tls={files}"]).cluster.tls
    assert tls is not None
    assert (tls.ca, tls.cert, tls.key) == tuple(f"/etc/shardray/{name}.pem" for name in ("ca", "cert", "key"))
    assert load_config(None, [MODEL]).cluster.tls is None
    assert problems("cluster.tls={ca: /ca.pem, cert: /cert.pem, key: key.pem}") == (
        'cluster.tls.key: "key.pem" is no absolute path, and hosts run in other folders',
    )
    assert problems("cluster.tls={ca: /ca.pem, cert: /cert.pem}") == (
        "cluster.tls.key: missing; give a text that is not empty",
    )


def test_a_missing_source_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None)
    assert caught.value.problems == (
        "model: missing; give a mapping with keys from source, dtype, max_model_len, revision",
    )


def test_all_problems_are_told_at_once_with_the_file_before_each(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {source: 3}\nengine: {block_size: -1, blocksize: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {source: a}\nengine: {}\nmodel: {source: b}\n", "line 3: key 'model' is given twice; keep one"),
        ("- model\n", "must be a mapping with sections model, parallel, engine, grpc, limits, ray"),
        ("model: [\n", "line 2: "),
        ("model: !!python/object:os.system {}\n", "line 1: could not determine a constructor"),
    ],
)
def test_a_file_that_is_not_settings_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file or directory"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("0", 0), ("512", 512), ("1kB", 1000), ("1 KiB", 1024), ("1.5GiB", 3 * 1024**3 // 2), ("2gb", 2 * 10**9), (7, 7)],
)
def test_sizes_are_read_in_both_kinds_of_units(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 Gi", "1.2.3MB", True, None, 1.5])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes or a size such as"):
        parse_bytes(text)


@given(st.integers(0, 2**60))
def test_a_number_of_bytes_survives_as_text(num_bytes: int) -> None:
    assert parse_bytes(f"{num_bytes}B") == parse_bytes(str(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("address", "expected"),
    [("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:50051", ("::1", 50051)), ("node-1.lan:0", ("node-1.lan", 0))],
)
def test_listen_addresses_are_split(address: str, expected: tuple[str, int]) -> None:
    assert parse_listen(address) == expected


@pytest.mark.parametrize("address", ["", ":50051", "localhost", "localhost:65536", "::1:50051", "http://a:1", "a b:1"])
def test_what_is_no_listen_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        parse_listen(address)


def test_every_key_has_a_description_in_the_schema() -> None:
    schema = config_schema()
    definitions = schema["$defs"].items()
    fields = {f"{name}.{key}": field for name, section in definitions for key, field in section["properties"].items()}
    assert len(fields) >= 25
    assert [key for key, field in fields.items() if not field.get("description")] == []


def test_the_schema_accepts_what_load_config_accepts_and_refuses_unknown_keys() -> None:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = yaml.safe_load("{model: {source: a}, parallel: {tensor_split: null}, engine: {kv_memory_bytes: 2GiB}}")
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, "parallel": {"tensor_paralel_size": 2}}, schema)


def test_the_defaults_in_the_schema_are_those_of_the_settings() -> None:
    config = json.loads(json.dumps(dataclasses.asdict(load_config(None, [MODEL]))))
    for section, reference in config_schema()["properties"].items():
        definition = config_schema()["$defs"][reference["$ref"].rpartition("/")[2]]
        for key, field in definition["properties"].items():
            if "default" in field:
                assert field["default"] == config[section][key]


def test_known_keys_are_the_fields() -> None:
    keys = set(known_keys(config_schema()))
    assert {"model", "model.source", "parallel.tensor_split", "ray.cpus_per_host"} <= keys
    assert {field.name for field in dataclasses.fields(Config)} == {key for key in keys if "." not in key}
