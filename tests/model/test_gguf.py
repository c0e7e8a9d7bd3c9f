"""GGUF files become folders that compute the same as the model they were written from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shardray.parallel.checkpoint import Checkpoint
from shardray.runtime.model import writing
from shardray.runtime.model.sources import ModelSourceError, resolve_model
from tests.model.gguf_writing import tiny_llama, write_gguf

TOKEN_IDS = torch.tensor([[1, 260, 270, 280, 265, 259, 290, 2]])


def convert(path: Path) -> Path:
    return resolve_model(str(path), cache_dir=path.parent)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS).logits


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"hidden_size": 96, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_theta": 500000.0, "rms_norm_eps": 1e-6},
    ],
    ids=["gqa", "tied", "narrow heads", "biases", "theta"],
)
def test_a_float32_file_gives_the_logits_of_the_model_it_was_written_from(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = tiny_llama(**options)
    converted = load(convert(write_gguf(tmp_path / "tiny.gguf", model)))
    assert converted.dtype == torch.float32
    assert torch.equal(logits(converted), logits(model))


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16])
def test_a_quantized_file_becomes_bfloat16_close_to_the_original(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    model = tiny_llama()
    converted = load(convert(write_gguf(tmp_path / "tiny.gguf", model, quantize=kind)))
    assert converted.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name].float(), weight, atol=0.02, rtol=0.02)


def add_llama3_factors(writer: gguf.GGUFWriter) -> None:
    model = tiny_llama(rope_parameters=LLAMA3)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy().astype(np.float32))


def add_linear_scaling(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def add_yarn_scaling(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("rope", "extra"),
    [
        (LLAMA3, add_llama3_factors),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, add_linear_scaling),
        (YARN, add_yarn_scaling),
    ],
    ids=["llama3", "linear", "yarn"],
)
def test_rotary_scalings_survive(
    tmp_path: Path, rope: dict[str, Any], extra: Callable[[gguf.GGUFWriter], None]
) -> None:
    model = tiny_llama(rope_parameters=rope)
    converted = load(convert(write_gguf(tmp_path / "tiny.gguf", model, extra=extra)))
    torch.testing.assert_close(logits(converted), logits(model))
    assert not torch.allclose(logits(tiny_llama()), logits(model))


def test_large_models_are_written_as_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 64 * 1024)
    model = tiny_llama()
    folder = convert(write_gguf(tmp_path / "tiny.gguf", model))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(Checkpoint(folder).tensors) == set(model.state_dict())
    assert torch.equal(logits(load(folder)), logits(model))


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    folder = convert(path)
    inode = (folder / "config.json").stat().st_ino
    assert convert(path) == folder
    assert (folder / "config.json").stat().st_ino == inode
    os.utime(path, ns=(0, 0))
    assert convert(path) != folder


def test_every_end_of_text_id_reaches_the_generation_config(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra=lambda writer: writer.add_eot_token_id(7))
    content = json.loads((convert(path) / "generation_config.json").read_text())
    assert content == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), architecture="falcon")
    with pytest.raises(ModelSourceError, match=r"tiny\.gguf: architecture 'falcon' is not read"):
        convert(path)
    assert not [entry for entry in (tmp_path / "models").iterdir() if entry.is_dir()]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda writer: writer.add_expert_count(8), "mixture of experts"),
        (lambda writer: writer.add_uint16("split.count", 3), "llama-gguf-split --merge"),
        (lambda writer: writer.add_tensor("blk.0.attn_gate.weight", np.ones(4, np.float32)), "attn_gate"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 3.0, np.float32)), "not a Llama 3 scaling"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), r"scaling\.(type|factor)"),
    ],
)
def test_what_a_llama_decoder_does_not_have_is_refused(
    tmp_path: Path, extra: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra=extra)
    with pytest.raises(ModelSourceError, match=message):
        convert(path)


@pytest.mark.parametrize(
    ("kind", "cut", "message"),
    [("bert", "gpt-2", r"tokenizer\.ggml\.model 'bert'"), ("gpt2", "other", r"tokenizer\.ggml\.pre 'other'")],
)
def test_an_unknown_tokenizer_is_refused_by_name(tmp_path: Path, kind: str, cut: str, message: str) -> None:
    def add_vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(cut)
        writer.add_token_list(["a"])

    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), add_vocabulary=add_vocabulary)
    with pytest.raises(ModelSourceError, match=message):
        convert(path)


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kept_share: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept_share)])
    with pytest.raises(ModelSourceError, match=r"tiny\.gguf: not a readable GGUF file"):
        convert(path)


def test_smollm2_knows_the_capital_of_france(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
