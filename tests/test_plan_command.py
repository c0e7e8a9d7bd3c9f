"""`shardray plan`, for every family: from headers alone, what each rank will own, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from shardray.parallel.checkpoint import Checkpoint
from shardray.runtime.cli.app import run
from shardray.runtime.cli.plan_tables import describe
from shardray.runtime.config import Config, ModelSettings, ParallelSettings
from shardray.runtime.engine.plan_report import Report, Wishes, make_report, to_jsonable
from shardray.runtime.model.decoder import ShardedDecoder  # noqa: F401 - imported before reads are counted
from shardray.runtime.model.load import ParameterLoader
from tests.model import encoder_zoo, zoo
from tests.tiny_models import save_llama

WISHES = Wishes(None, 4 << 30, 3.0e12, 900e12, 50e9, 5e-6, 32, None, None)
SAVERS = dict.fromkeys(zoo.ZOO, zoo.save) | dict.fromkeys(
    (*encoder_zoo.ENCODERS, *encoder_zoo.PAIRS), encoder_zoo.save_encoder
)


def report_of(folder: Path, **parallel: int | bool) -> Report:
    config = Config(
        model=ModelSettings(source=str(folder), dtype="float32"),
        parallel=ParallelSettings(**parallel),  # type: ignore[arg-type]
    )
    return make_report(config, WISHES)


@pytest.mark.parametrize("name", SAVERS)
def test_every_family_is_planned_to_the_byte_that_ranks_then_own(name: str, tmp_path: Path) -> None:
    folder = SAVERS[name](name, tmp_path)
    report = report_of(folder, tensor_parallel_size=3, pipeline_parallel_size=2)
    served, mesh = report.served, report.chosen.mesh
    for host in mesh.hosts:
        loader = ParameterLoader(Checkpoint(folder), served.family, served.spec, mesh.plan, host.tp_rank, torch.float32)
        owned = [loader.embedding()] if host.stage == 0 else []
        owned += [loader.layer(index) for index in host.layers]
        owned += [loader.encoder_end()] if served.spec.num_encoder_layers - 1 in host.layers else []
        owned += [loader.head()] if host.stage == 1 else []
        assert host.memory.weight_bytes == sum(tensor.nbytes for part in owned for tensor in part.values())
        assert loader.num_bytes == host.memory.weight_bytes
    assert json.loads(json.dumps(to_jsonable(report)))["fits"]
    assert report.prompt.flops > 0
    assert (report.decode.flops > 0) == bool(served.spec.layers)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    console.print(describe(report))
    assert max(map(len, console.export_text().splitlines())) <= 120


def num_bytes_read() -> int:
    """By this process, from files as well as from sockets."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("shard_size", ["50GB", "1MB"])
def test_no_byte_of_a_weight_is_read(shard_size: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", hidden_size=288, vocab_size=4001)
    if shard_size != "50GB":
        from transformers import LlamaForCausalLM

        LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "cut", max_shard_size=shard_size)
        folder = tmp_path / "cut"
        assert len(list(folder.glob("*.safetensors"))) > 3
    report_of(folder)  # what is imported for the first time is read, too
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    before = num_bytes_read()
    report = report_of(folder, tensor_parallel_size=2)
    assert num_bytes_read() - before < 128 * 1024 < weights / 10
    assert sum(host.memory.weight_bytes for host in report.chosen.mesh.hosts) >= weights * 0.9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny"))


def test_the_best_shape_for_some_hosts_is_told_as_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "3", "--memory", "24GiB", "--bandwidth", "3.0TB/s", "--compute", "900TFLOP/s", "--json"]
    assert run(["plan", "--set", f"model.source={tiny}", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["num_hosts"], found["host_memory_bytes"]) == ("cuda", 3, 24 << 30)
    assert found["chosen"] == found["shapes"][0]
    rates = [shape["rates"]["fleet_decode_tokens_per_s"] for shape in found["shapes"]]
    assert rates == sorted(rates, reverse=True)
    assert len(found["shapes"]) == 5


@pytest.mark.integration
def test_what_was_measured_is_told_beside_what_follows(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "engine.device=cpu", "--set", "parallel.tensor_parallel_size=2", "--measure"]
    assert run(["plan", "--set", f"model.source={tiny}", *options, "--message-us", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hardware"]["message_s"] == pytest.approx(7e-6)
    assert found["hardware"]["machine"]["num_hosts"] >= 1
    assert found["hardware"]["spread"] >= 1
    launches = found["hardware"]["decode_launches"]
    step_s = launches["step_s"] + found["hosts"][0]["num_layers"] * launches["layer_s"]
    assert 0 < step_s < 1 / found["chosen"]["rates"]["stream_tokens_per_s"]


def test_figures_that_were_measured_beside_other_work_are_told_with_a_warning(tiny: Path) -> None:
    report = report_of(tiny)
    assert report.hardware is not None
    for spread, is_told in ((None, False), (1.4, False), (1.6, True)):
        told = dataclasses.replace(report, hardware=dataclasses.replace(report.hardware, spread=spread))
        console = Console(width=200)
        with console.capture() as printed:
            console.print(describe(told))
        assert ("up to 1.6 times as long" in printed.get()) == is_told


def test_what_does_not_fit_ends_with_1_and_says_what_would(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--set", f"model.source={tiny}", "--set", "engine.device=cuda", "--memory", "1MiB"]) == 1
    printed = capsys.readouterr().out
    assert "Does not fit: stage 0 tensor rank 0 lacks" in printed
    assert "Any one of these would do:\n  * " in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--memory", "lots"], "Invalid value for --memory: 'lots' is not a number of bytes or a size"),
        (["--bandwidth", "3TB", "--compute", "1TFLOP/s"], "Invalid value for --bandwidth: '3TB' is no bandwidth"),
        (["--bandwidth", "3TB/s", "--compute", "fast"], "Invalid value for --compute: 'fast' is no rate such as"),
        (["--bandwidth", "3TB/s"], "Invalid value for --bandwidth and --compute: rates follow from both"),
        (["--measure", "--bandwidth", "3TB/s", "--compute", "1TFLOP/s"], "Invalid value for --measure and --bandwidth"),
        (
            ["--measure", "--gpus", "2", "--memory", "1GiB"],
            "--measure: times the kernels of CPUs, and engine.device is",
        ),
        (["--link", "0GB/s"], "Invalid value for --link: '0GB/s' is nothing at all"),
        (["--context", "1024"], "--context 1024: there is room for 1023 tokens (model.max_model_len); give fewer"),
        (["--set", "parallel.pipeline_parallel_size=6"], "pipeline_parallel_size 6: 5 layers can be cut into 1 to 5"),
        (["--set", "model.max_model_len=2000"], "model.max_model_len 2000 exceeds the model's window of 1024"),
        (["--set", "engine.device=cuda"], "engine.device: cuda: this machine has no GPU to ask; give --memory"),
    ],
)
def test_a_bad_wish_is_one_line(
    tiny: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "engine.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU to ask")
    assert run(["plan", "--set", f"model.source={tiny}", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {expected}")
    assert captured.err.count("\n") == 1


def test_a_model_that_is_not_here_is_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDRAY_CACHE", str(tmp_path))
    assert run(["plan", "--set", "model.source=smollm2-135m"]) == 2
    expected = "error: smollm2-135m: is not in the cache yet; fetch it first: shardray pull smollm2-135m\n"
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"missing: model\.layers\.3\.mlp\.up_proj\.weight"):
        report_of(tmp_path)
