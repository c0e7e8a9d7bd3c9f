"""What a step costs beside its arithmetic and its bytes: measured on models so small that nothing else is left."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from shardray.runtime.engine.hardware import Launches
from shardray.runtime.engine.llm import LLM
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.model.random_model import write_model

_FEW, _MANY = 2, 10  # layers
_ROWS = 32
_SIZE = 64
_PROMPT_LEN, _NUM_TOKENS, _NUM_PROMPTS = 8, 64, 9
_NUM_WARM = 4  # steps; kernels are recorded meanwhile
_SIZES = {
    "hidden_size": _SIZE, "intermediate_size": _SIZE, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": _SIZE // 2, "vocab_size": 256,
}  # fmt: skip


def measure_launches(num_threads: int) -> tuple[Launches, Launches]:
    """(of a decode step, of a step that reads a prompt) of one host on this machine's CPUs."""
    few, many = (_step_times_s(num_layers, num_threads) for num_layers in (_FEW, _MANY))
    one_s, all_s, prompt_s = ((more - less) / (_MANY - _FEW) for less, more in zip(few, many, strict=True))  # a layer
    row_s = max(0.0, (all_s - one_s) / (_ROWS - 1))
    decode = Launches(max(0.0, few[0] - _FEW * one_s), max(0.0, one_s - row_s), row_s)
    return decode, Launches(max(0.0, few[2] - _FEW * prompt_s), max(0.0, prompt_s))


def _step_times_s(num_layers: int, num_threads: int) -> tuple[float, float, float]:
    """Of a decode step of one sequence, of one of many, and of a prompt."""
    prompts = [range(3 + row, 3 + row + _PROMPT_LEN) for row in range(_ROWS)]
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name, "model"), _SIZES | {"num_hidden_layers": num_layers})
        llm = LLM(
            folder, device="cpu", num_threads=num_threads, max_num_seqs=_ROWS, kv_memory_bytes=32 << 20,
            skip_tokenizer_init=True,
        )  # fmt: skip
        with llm:
            one_s, all_s = (time_decode(llm, some, _NUM_TOKENS) for some in (prompts[:1], prompts))
            return one_s, all_s, time_prompt(llm, prompts[:_NUM_PROMPTS])


def time_decode(llm: LLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
    """Seconds from token to token of a sequence while all of them decode; the median."""
    streams = llm.streams()
    for prompt in prompts:
        streams.add(prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
    waited_for, arrivals_s = {*range(len(prompts))}, []
    while streams.num_live:
        numbers = {streamed.number for streamed in streams.poll()}
        if not waited_for and 0 in numbers:
            arrivals_s.append(time.perf_counter())
        waited_for -= numbers
    gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s[_NUM_WARM:])]
    return statistics.median(gaps_s)


def time_prompt(llm: LLM, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds until the first token of a prompt alone; the median, without the first one."""
    took_s = []
    for prompt in prompts:
        began_s = time.perf_counter()
        llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1))
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s[1:])
