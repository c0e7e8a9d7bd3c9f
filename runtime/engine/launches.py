"""What a step costs beside its arithmetic and its bytes: measured on models so small that nothing else is left."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from shardray.runtime.engine.hardware import Launches
from shardray.runtime.engine.llm import LLM
from shardray.runtime.engine.request import SamplingParams

_FEW, _MANY = 2, 10  # layers
_SIZE, _VOCAB = 64, 256
_PROMPT_LEN, _NUM_STEPS, _NUM_PROMPTS = 8, 64, 9
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 256, "hidden_size": _SIZE, "intermediate_size": _SIZE, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": _SIZE // 2, "vocab_size": _VOCAB,
}  # fmt: skip


def measure_launches(num_threads: int) -> tuple[Launches, Launches]:
    """(of a decode step, of a step that reads a prompt) of one host on this machine's CPUs."""
    few, many = (_step_times_s(num_layers, num_threads) for num_layers in (_FEW, _MANY))
    decode, prefill = (_line(*pair) for pair in zip(few, many, strict=True))
    return decode, prefill


def _line(few_s: float, many_s: float) -> Launches:
    layer_s = max(0.0, (many_s - few_s) / (_MANY - _FEW))
    return Launches(max(0.0, few_s - _FEW * layer_s), layer_s)


def _step_times_s(num_layers: int, num_threads: int) -> tuple[float, float]:
    """Medians: from token to token, and from a prompt to its token."""
    with tempfile.TemporaryDirectory() as name:
        folder = _write_model(Path(name), num_layers)
        llm = LLM(
            folder, device="cpu", num_threads=num_threads, max_num_seqs=1, kv_memory_bytes=8 << 20,
            skip_tokenizer_init=True,
        )  # fmt: skip
        with llm:
            arrivals_s = [_arrivals_s(llm, _NUM_STEPS) for _ in range(2)][-1]  # the first warms up
            prompts_s = [_arrivals_s(llm, 1) for _ in range(_NUM_PROMPTS)]
    steps_s = [after - before for before, after in itertools.pairwise(arrivals_s[1:])]
    return statistics.median(steps_s), statistics.median(after - before for before, after in prompts_s)


def _arrivals_s(llm: LLM, num_tokens: int) -> list[float]:
    """When a prompt was handed over, and when each of its tokens came."""
    at_s = [time.perf_counter()]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    for _ in llm.stream(range(3, 3 + _PROMPT_LEN), params):
        at_s.append(time.perf_counter())
    return at_s


def _write_model(folder: Path, num_layers: int) -> Path:
    (folder / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": num_layers}))
    square, norm = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                    "mlp.up_proj", "mlp.down_proj"), ("input_layernorm", "post_attention_layernorm")  # fmt: skip
    shapes = dict.fromkeys(square, (_SIZE, _SIZE)) | dict.fromkeys(norm, (_SIZE,))
    of_layers = {f"layers.{i}.{name}": shape for i in range(num_layers) for name, shape in shapes.items()}
    everything = {"embed_tokens": (_VOCAB, _SIZE), "norm": (_SIZE,)} | of_layers
    tensors = {f"model.{name}.weight": torch.full(shape, 0.01).bfloat16() for name, shape in everything.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
