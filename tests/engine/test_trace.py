"""What ranks write down while a trace is on: every step with all that it waits for, and nothing before or after."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from shardray.parallel import spans as spans_module
from shardray.parallel.spans import Span, SpanKind, Spans
from tests.engine.test_same_tokens import make_arrivals
from tests.ranks import FormedMesh, RankPool
from tests.tiny_models import save_llama

NUM_LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def traced(pool: RankPool, mesh: FormedMesh) -> tuple[dict[str, list[int]], list[list[Span]]]:
    """The tokens of some requests, and each rank's spans"""
    size = len(mesh.infos)
    pool.call_all(size, "start_trace", [None] * size)
    served = mesh.serve(make_arrivals(251, [1, 30, 9], 12))
    answers = pool.call_all(size, "stop_trace", [None] * size)
    assert not any(left for _, left in answers)
    return {name: served.token_ids(name) for name in served.outputs}, [found for found, _ in answers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_sum_of_tensor_ranks_lies_within_its_step(pool: RankPool, folder: Path, dtype: str) -> None:
    with pool.mesh(folder, 2, 1, dtype=dtype) as mesh:
        served = mesh.serve(make_arrivals(251, [1, 30, 9], 12))
        tokens, ranks = traced(pool, mesh)
        assert tokens == {name: served.token_ids(name) for name in served.outputs}
        _, again = traced(pool, mesh)
    for found in (*ranks, *again):
        steps = [span for span in found if span.kind == SpanKind.STEP]
        assert len(steps) > 10
        for step in steps:
            names = Counter(span.name for span in found if span.kind == SpanKind.COLLECTIVE and holds(step, span))
            assert names["all_reduce"] == 2 * NUM_LAYERS + 1
            assert names["all_gather"] <= 1  # none where no row samples
            assert names["gather"] == names["broadcast"] == 0  # of logits that are more than compared
        outside = [span for span in found if not any(holds(step, span) for step in steps)]
        assert all(span.begin_ns > steps[-1].begin_ns for span in outside), "only a step at the end may be cut off"


def holds(step: Span, span: Span) -> bool:
    return step.begin_ns <= span.begin_ns and span.begin_ns + span.duration_ns <= step.begin_ns + step.duration_ns


def test_stages_hand_over_and_wait_and_their_clocks_agree(pool: RankPool, folder: Path) -> None:
    with pool.mesh(folder, 2, 2) as mesh:
        _, ranks = traced(pool, mesh)
    first, last = ranks[0], ranks[2]
    sent = [span for span in first if span.kind == SpanKind.HANDOVER]
    waited = [span for span in last if span.kind == SpanKind.BUBBLE]
    assert {span.name for span in sent} == {"to stage 1"}
    assert {span.name for span in waited} == {"wait for stage 0"}
    assert min(len(sent), len(waited)) > 10
    for hand, wait in zip(sent, waited, strict=False):  # nothing is there before it was sent
        assert wait.begin_ns + wait.duration_ns >= hand.begin_ns


def test_steps_say_what_they_were_made_of(pool: RankPool, folder: Path) -> None:
    with pool.mesh(folder, 1, 1) as mesh:
        _, (found,) = traced(pool, mesh)
    assert {span.kind for span in found} == {SpanKind.STEP}
    what = {span.name.partition(": ")[2] for span in found}
    assert any("tokens of" in one for one in what)
    assert any(one.endswith(" decodes") for one in what)


def test_nothing_is_written_down_unless_a_trace_is_on(pool: RankPool, folder: Path) -> None:
    with pool.mesh(folder, 1, 1) as mesh:
        mesh.serve(make_arrivals(251, [5], 4))
        assert pool.call(0, "stop_trace") == ([], False)


def test_too_many_spans_are_counted_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "MAX_SPANS", 3)
    spans = Spans()
    for _ in range(5):
        spans.note(SpanKind.STEP, "step", 0)
    assert (len(spans.found), spans.num_dropped) == (3, 2)


def test_a_call_that_raises_is_written_down_as_well() -> None:
    class Part:
        def recv(self) -> None:
            raise ConnectionError

    part, spans = Part(), Spans()
    spans.attach(part, "recv", SpanKind.BUBBLE, "wait")
    with pytest.raises(ConnectionError):
        part.recv()
    spans.detach()
    assert [span.name for span in spans.found] == ["wait"]
    assert "recv" not in vars(part)
