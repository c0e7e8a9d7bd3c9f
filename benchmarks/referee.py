"""Whether contestants compute the same model: their greedy tokens against ``transformers`` in float32.

The reference reads a request's prompt and the contestant's own tokens. Wherever the contestant took another token than
the reference's best, the reference's logits of the two may differ by no more than a bound: what rounding in the dtype
explains. The reference's two best logits are then no further apart than that either. Bounds are in units of logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import INT8, Request, Trace

BOUNDS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5, INT8: 2.0}
NUM_REQUESTS = 8  # of a workload, evenly chosen: the reference takes its time


@dataclass(frozen=True)
class Verdict:
    """On some requests of one contestant and workload."""

    num_requests: int
    num_same: int  # that have the reference's tokens from beginning to end
    num_tokens: int
    num_other: int  # tokens that are not the reference's best at their place
    worst_gap: float  # between the reference's best logit and that of the token taken
    bound: float

    @property
    def agrees(self) -> bool:
        return self.worst_gap <= self.bound


def judge(
    model_dir: Path, dtype: str, num_threads: int, pairs: Sequence[tuple[Request, Trace]], most: int = NUM_REQUESTS
) -> Verdict:
    """Judges up to ``most`` of the requests with their outputs. Raises ValueError if the reference cannot run."""
    return verdict(gaps(model_dir, num_threads, _evenly(pairs, most)), BOUNDS[dtype])


def verdict(gaps_of_requests: Sequence[Sequence[float]], bound: float) -> Verdict:
    """``gaps_of_requests``: for each token of each request the best logit less its own."""
    every = [gap for gaps_of_one in gaps_of_requests for gap in gaps_of_one]
    return Verdict(
        num_requests=len(gaps_of_requests),
        num_same=sum(not any(gaps_of_one) for gaps_of_one in gaps_of_requests),
        num_tokens=len(every),
        num_other=sum(gap > 0 for gap in every),
        worst_gap=max(every, default=0.0),
        bound=bound,
    )


def verdict_record(one: Verdict) -> dict[str, Any]:
    return {"kind": "agreement", **asdict(one), "agrees": one.agrees}


def gaps(model_dir: Path, num_threads: int, pairs: Sequence[tuple[Request, Trace]]) -> list[list[float]]:
    """For each token of each output, how far its logit is below the reference's best; in a process of its own."""
    job = {
        "model_dir": str(model_dir),
        "num_threads": num_threads,
        "sequences": [[request.prompt_ids, trace.token_ids] for request, trace in pairs],
    }
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.referee"],
        cwd=Path(__file__).parent.parent, env=environment, input=json.dumps(job), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"the reference did not run: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _evenly(pairs: Sequence[tuple[Request, Trace]], most: int) -> list[tuple[Request, Trace]]:
    step = max(1.0, len(pairs) / most)
    return [pairs[int(number * step)] for number in range(min(most, len(pairs)))]


def measure(job: dict[str, Any]) -> Iterator[list[float]]:
    """What ``gaps`` asks its process for: model_dir, num_threads, sequences of prompt and output."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["num_threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["model_dir"], dtype=torch.float32)
    for prompt_ids, token_ids in job["sequences"]:
        with torch.inference_mode():
            fed = torch.tensor([prompt_ids + token_ids[:-1]])
            logits = model(fed, logits_to_keep=len(token_ids)).logits[0]  # (num_tokens, vocab_size)
        taken = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        yield (logits.amax(dim=1) - taken).tolist()


if __name__ == "__main__":
    for gaps_of_one in measure(json.loads(sys.stdin.read())):
        print(json.dumps(gaps_of_one), flush=True)
