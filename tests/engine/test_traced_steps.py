"""A traced request is told of every step that it took part in, with the time of every stage; no other one is."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from tests.engine.test_same_tokens import make_arrivals
from tests.ranks import Arrival, RankPool
from tests.tiny_models import save_llama

PROMPT_LENS = (1, 30, 9)
NUM_TOKENS = 12
MOST = 16  # tokens a step: the long prompt takes two


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def traced(arrivals: list[Arrival], *indices: int) -> list[Arrival]:
    return [
        Arrival(msgspec.structs.replace(arrival.request, is_traced=index in indices), arrival.after_step)
        for index, arrival in enumerate(arrivals)
    ]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_each_step_of_a_traced_request_is_told_with_all_its_stages(
    pool: RankPool, folder: Path, shape: tuple[int, int]
) -> None:
    arrivals = make_arrivals(251, list(PROMPT_LENS), NUM_TOKENS)
    with pool.mesh(folder, *shape, max_num_seqs=4, max_num_batched_tokens=MOST) as mesh:
        expected = mesh.serve(arrivals)
        began_ns = time.time_ns()
        served = mesh.serve(traced(arrivals, 0, 1))
        again = mesh.serve(arrivals)
    names = [arrival.request.request_id for arrival in arrivals]
    for name in names:
        assert served.token_ids(name) == again.token_ids(name) == expected.token_ids(name)
    for name, prompt_len in zip(names[:2], PROMPT_LENS, strict=False):
        outputs = served.outputs[name]
        assert all(output.steps for output in outputs if output.token_id is not None)
        steps = [step for output in outputs for step in output.steps]
        found = outputs[0].num_cached_prompt_tokens
        computed = prompt_len - found + NUM_TOKENS - 1  # the last token is not computed with; one in flight may be
        assert computed <= sum(step.num_tokens for step in steps) <= computed + 1
        assert [step.step for step in steps] == sorted({step.step for step in steps})
        assert all(step.num_tokens <= step.num_batched_tokens <= MOST for step in steps)
        for step in steps:
            assert began_ns < step.begin_ns < step.begin_ns + step.duration_ns < time.time_ns()
            assert len(step.stages) == shape[1]
            begins = [step.begin_ns, *(stage.begin_ns for stage in step.stages)]
            assert begins == sorted(begins)
            assert all(0 < stage.duration_ns < step.duration_ns for stage in step.stages)
    untold = [*served.outputs[names[2]], *(output for name in names for output in again.outputs[name])]
    assert not any(output.steps for output in untold)
