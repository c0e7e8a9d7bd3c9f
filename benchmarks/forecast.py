"""What ``shardray plan --measure`` forecasts of a step, beside what the step then takes: in process, on CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from shardray import LLM
from shardray.runtime.engine.forecast import decode_tokens_per_s, prefill_rates
from shardray.runtime.engine.hardware import USUAL_LINK_BYTES_PER_S, USUAL_MESSAGE_S, Hardware
from shardray.runtime.engine.launches import time_decode, time_prompt
from shardray.runtime.engine.measuring import measure_hardware
from shardray.runtime.engine.served import ServedSpec, read_served
from shardray.runtime.engine.shapes import cut
from shardray.runtime.model.sources import resolve_model

DECODES = (
    (1, 128), (1, 2048), (4, 1024), (4, 2048), (8, 512), (8, 2048), (16, 512), (32, 128), (32, 256), (32, 1024),
    (64, 128), (64, 256),
)  # fmt: skip
PROMPTS = (128, 512, 2048)
TOLERANCE = 0.2
_NUM_TOKENS, _NUM_PROMPTS = 28, 4
_MAX_SEQS, _MAX_TOKENS, _KV_BYTES = 64, 2048, 1 << 30


@dataclass(frozen=True)
class ForecastSetup:
    """One cut of a model, and the steps that are foretold and timed."""

    model: str
    dtype: str
    tp_size: int
    pp_size: int
    num_threads: int  # of each rank
    decodes: Sequence[tuple[int, int]] = DECODES  # (sequences, tokens of context)
    prompts: Sequence[int] = PROMPTS  # tokens; each read alone

    @property
    def cut(self) -> str:
        return f"{self.tp_size}x{self.pp_size}, {self.num_threads} threads"


@dataclass(frozen=True)
class Foretold:
    """Of a decode step: until each sequence has its next token. Of a prompt: until its first token."""

    cut: str
    kind: str
    num_seqs: int
    num_tokens: int  # of context, or of the prompt
    roofline_s: float  # from bandwidth and compute alone
    forecast_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        return self.forecast_s / self.measured_s


def measure(setup: ForecastSetup) -> Iterator[Foretold]:
    """Learns how fast the machine is now, then times each step."""
    folder = resolve_model(setup.model)
    bounds = SimpleNamespace(max_num_seqs=_MAX_SEQS, max_num_batched_tokens=_MAX_TOKENS, block_size=16)
    served = read_served(folder, setup.dtype, None, bounds)
    hardware = measure_hardware(served, setup.tp_size * setup.pp_size, setup.num_threads)
    with LLM(
        folder, dtype=setup.dtype, device="cpu", tensor_parallel_size=setup.tp_size,
        pipeline_parallel_size=setup.pp_size, num_threads=setup.num_threads, max_num_seqs=_MAX_SEQS,
        max_num_batched_tokens=_MAX_TOKENS, max_prefill_beside_decodes=_MAX_TOKENS, kv_memory_bytes=_KV_BYTES,
        prefix_caching=False, skip_tokenizer_init=True,
    ) as llm:  # fmt: skip
        for num_seqs, context_len in setup.decodes:
            prompts = [_prompt(context_len, seed) for seed in range(num_seqs)]
            num_waiting = num_seqs * context_len // _MAX_TOKENS  # steps until the last prompt is read
            measured_s = time_decode(llm, prompts, _NUM_TOKENS + num_waiting)
            yield _foretold(setup, served, hardware, "decode", num_seqs, context_len, measured_s)
        for prompt_len in setup.prompts:
            measured_s = time_prompt(llm, [_prompt(prompt_len, seed) for seed in range(_NUM_PROMPTS)])
            yield _foretold(setup, served, hardware, "prompt", 1, prompt_len, measured_s)


def _foretold(
    setup: ForecastSetup, served: ServedSpec, hardware: Hardware, kind: str, num_seqs: int, num_tokens: int,
    measured_s: float,
) -> Foretold:  # fmt: skip
    plan = cut(served.spec, setup.tp_size, setup.pp_size, False)

    def forecast_s(hardware: Hardware) -> float:
        if kind == "prompt":
            return prefill_rates(served, plan, num_tokens, hardware)[1]
        return num_seqs / decode_tokens_per_s(served, plan, num_seqs, num_tokens, hardware)

    speed = hardware.speed
    intensity, byte_s = speed.products.points[-1]
    roofline = Hardware.of(speed.memory_bytes_per_s, intensity / byte_s, USUAL_LINK_BYTES_PER_S, USUAL_MESSAGE_S)
    return Foretold(setup.cut, kind, num_seqs, num_tokens, forecast_s(roofline), forecast_s(hardware), measured_s)


def _prompt(num_tokens: int, seed: int) -> list[int]:
    return [5 + (7919 * seed + 31 * place) % 997 for place in range(num_tokens)]


def to_table(found: Sequence[Foretold]) -> str:
    """Markdown: a row for each step, and how many are within the tolerance."""
    rows = [
        f"| {one.cut} | {one.kind} | {one.num_seqs} | {one.num_tokens:,} | {1e3 * one.roofline_s:.1f} "
        f"| {1e3 * one.forecast_s:.1f} | {1e3 * one.measured_s:.1f} | {one.ratio:.2f} |"
        for one in found
    ]
    num_within = sum(abs(one.ratio - 1) <= TOLERANCE for one in found)
    return "\n".join(
        [
            "| cut | step | sequences | tokens | roofline, ms | forecast, ms | measured, ms | ratio |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            f"Forecast within {TOLERANCE:.0%} of what was measured: {num_within} of {len(found)}.",
        ]
    )
