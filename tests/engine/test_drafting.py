"""Drafted tokens make steps fewer, and change no token: whatever the family, the cut, the dtype, and how it samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray import LLM
from shardray.runtime.engine import scheduler
from shardray.runtime.engine.llm import Completion
from shardray.runtime.engine.lookup import PromptLookup
from shardray.runtime.engine.request import EngineRequest, EngineStats, FinishReason, SamplingParams
from shardray.runtime.engine.scheduler import Scheduler
from shardray.runtime.engine.step import Sampled, StepPlan, StepResult
from tests.engine.scheduling import LIMITS, committed, planned
from tests.engine.toy_mesh import ToyService
from tests.model.encoder_zoo import PAIRS, PairReference, save_encoder
from tests.model.zoo import ZOO, save
from tests.ranks import Arrival, RankPool
from tests.tiny_models import Reference, save_gpt2

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
TEXT = (
    "<|im_start|>user\nRepeat exactly:\n\nThe lamp burned all night. The boat came at noon, with oil and letters. "
    "The boat left at one, and the keeper mended two panes with tin before dark.<|im_end|>\n<|im_start|>assistant\n"
)


def lookup_of(*token_ids: int) -> PromptLookup:
    lookup = PromptLookup(token_ids)
    lookup.read()
    return lookup


def test_a_text_is_expected_to_go_on_as_it_did_before() -> None:
    quoted = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert lookup_of(*quoted, 20, *quoted[:4]).draft(7) == (5, 6, 7)
    assert lookup_of(*quoted, 20, *quoted[:4]).draft(2) == (5,)
    assert lookup_of(*quoted, 20, *quoted[:4]).draft(0) == ()
    assert lookup_of(*quoted, 20, *quoted[:8]).draft(100) == (9, 20, 1, 2, 3, 4, 5)


def test_the_longer_a_text_has_repeated_the_more_is_drafted_and_nothing_once_it_has_changed() -> None:
    quoted = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert [len(lookup_of(*quoted, 20, *quoted[:count]).draft(7)) for count in range(9)] == [0, 0, 1, 1, 3, 3, 3, 3, 7]
    assert lookup_of(*quoted, 20, *quoted[:6], 21).draft(7) == ()
    assert lookup_of(*quoted, 20, *quoted[:6]).is_sure(4)
    assert not lookup_of(*quoted, 20, *quoted[:6]).is_sure(5)
    assert not lookup_of(*quoted).is_sure(0)


def test_of_two_places_the_last_one_is_taken() -> None:
    assert lookup_of(1, 2, 3, 1, 2, 4, 1, 2).draft(1) == (4,)


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_text_that_goes_round_is_drafted_past_its_end(period: int) -> None:
    lookup = lookup_of(*(number % period for number in range(40)))
    assert lookup.draft(15) == tuple(number % period for number in range(40, 55))


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 20), st.integers(1, 7))
def test_a_text_that_is_read_in_parts_is_drafted_alike(token_ids: list[int], most: int, part: int) -> None:
    known: list[int] = []
    lookup = PromptLookup(known)
    for first in range(0, len(token_ids), part):
        known += token_ids[first : first + part]
        lookup.read()
    drafted = lookup.draft(most)
    assert drafted == lookup_of(*token_ids).draft(most)
    assert len(drafted) in [count for count in (0, 1, 3, 7, 15) if count <= most]


def test_wrong_and_right_drafts_leave_the_texts_of_undisturbed_runs() -> None:
    service = ToyService(replace(LIMITS, max_draft_tokens=7, max_in_flight=2, lookahead=1))
    for number in range(1, 40, 2):
        params = SamplingParams(seed=number, max_tokens=60, ignore_eos=True)
        service.add(EngineRequest(request_id=str(number), prompt_ids=(number % 12,), params=params))
    service.drain()
    stats = service.scheduler.stats()
    assert 100 < stats.num_accepted_tokens < stats.num_drafted_tokens < 1000


def drafting(params: SamplingParams, token_ids: tuple[int, ...]) -> tuple[Scheduler, StepPlan]:
    """A scheduler whose one request, which repeats its prompt, has tokens drafted in the plan that is in flight."""
    own = Scheduler(replace(LIMITS, max_draft_tokens=3))
    quoted = (5, 6, 7, 8, 9, 10, 11)
    own.add(EngineRequest(request_id="a", prompt_ids=(*quoted, 20, *quoted[:5]), params=params))
    for token_id in token_ids:
        committed(own, planned(own), token_id)
    return own, planned(own)


def test_tokens_behind_a_wrong_draft_are_not_published_and_the_next_row_begins_where_it_stood() -> None:
    own, plan = drafting(SamplingParams(max_tokens=20), (10,))
    assert [(row.start, row.token_ids, row.num_drafted) for row in plan.rows] == [(13, (10, 11, 20, 5), 3)]
    outputs = own.commit(StepResult(plan.step, tuple(map(Sampled, (11, 4, 6, 7)))))
    assert [output.token_id for output in outputs] == [11, 4]
    assert [(row.start, row.token_ids) for row in planned(own).rows] == [(15, (4,))]
    assert (own.stats().num_drafted_tokens, own.stats().num_accepted_tokens) == (3, 1)


def test_a_stop_among_drafted_tokens_ends_the_request_there() -> None:
    own, plan = drafting(SamplingParams(max_tokens=20, stop_token_ids=(20,)), (10,))
    outputs = own.commit(StepResult(plan.step, tuple(map(Sampled, (11, 20, 5, 6)))))
    assert [(output.token_id, output.finish_reason) for output in outputs] == [(11, None), (20, FinishReason.STOP)]
    assert not own.has_work
    own.check_idle()


def test_logits_that_are_not_finite_behind_a_drafted_token_end_the_request_behind_it() -> None:
    own, plan = drafting(SamplingParams(max_tokens=20), (10,))
    outputs = own.commit(StepResult(plan.step, tuple(map(Sampled, (11, 20, -1, 6)))))
    reasons = [(output.token_id, output.finish_reason) for output in outputs]
    assert reasons == [(11, None), (20, None), (None, FinishReason.ERROR)]
    own.check_idle()


def test_no_more_is_drafted_than_the_request_may_have() -> None:
    _, plan = drafting(SamplingParams(max_tokens=3), (10,))
    assert [row.num_drafted for row in plan.rows] == [1]
    _, plan = drafting(SamplingParams(max_tokens=2), (10,))
    assert [row.num_drafted for row in plan.rows] == [0]


@pytest.mark.parametrize("params", [SamplingParams(min_tokens=2), SamplingParams(repetition_penalty=1.1)])
def test_nothing_is_drafted_while_tokens_depend_on_more_than_their_place(params: SamplingParams) -> None:
    _, plan = drafting(params, (10,))
    assert [row.num_drafted for row in plan.rows] == [0]


def test_a_request_cancelled_with_drafted_tokens_in_flight_leaves_nothing() -> None:
    own, plan = drafting(SamplingParams(max_tokens=20), (10,))
    assert own.cancel("a") is not None
    assert own.commit(StepResult(plan.step, tuple(map(Sampled, (11, 20, 5, 6))))) == []
    own.check_idle()
    own.check_integrity()


class Oracle:
    """Takes the place of PromptLookup: drafts what comes next, but for every fifth token of a text."""

    texts: ClassVar[list[list[int]]] = []

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def read(self) -> None:
        assert any(text[: len(self._token_ids)] == self._token_ids for text in self.texts)

    def is_sure(self, fewest_right: int) -> bool:
        return True

    def draft(self, most: int) -> tuple[int, ...]:
        known = len(self._token_ids)
        text = next(text for text in self.texts if text[:known] == self._token_ids)
        return tuple(text[i] if i % 5 else (text[i] + 1) % 97 for i in range(known, min(known + most, len(text))))


@pytest.mark.parametrize("name", ZOO)
def test_a_family_gives_the_tokens_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of what is drafted for several requests of a step is right, and some wrong."""
    reference = Reference(save(name, tmp_path))
    prompts = [(5, 60, 7, 33, 9, 81), (11, 12, 40), tuple(range(20, 50))]
    texts = [[*prompt, *reference.greedy(prompt, GREEDY.max_tokens)] for prompt in prompts]
    monkeypatch.setattr(Oracle, "texts", texts)
    monkeypatch.setattr(scheduler, "PromptLookup", Oracle)
    with LLM(tmp_path, device="cpu", dtype="float32", max_num_seqs=3, max_draft_tokens=4) as llm:
        found = llm.generate(prompts, GREEDY)
        stats = llm.stats()
    assert [[*one.prompt_ids, *one.token_ids] for one in found] == texts
    assert stats.num_accepted_tokens > stats.num_drafted_tokens / 2 > 30
    assert stats.num_steps < GREEDY.max_tokens


@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_behind_an_encoder_gives_the_tokens_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = PairReference(save_encoder(name, tmp_path))
    prompts = [(5, 60, 7, 33, 9, 81), (11, 12, 40), tuple(range(20, 50))]
    answers = [reference.greedy(prompt, GREEDY.max_tokens) for prompt in prompts]
    monkeypatch.setattr(scheduler, "PromptLookup", Oracle)
    with LLM(tmp_path, device="cpu", dtype="float32", max_num_seqs=3, max_model_len=64, max_draft_tokens=4) as llm:
        given_ids = EngineRequest(request_id="", prompt_ids=(5,), params=GREEDY).given_ids(llm._engine.info.encoder)
        monkeypatch.setattr(Oracle, "texts", [[*given_ids, *answer] for answer in answers])
        found = llm.generate(prompts, GREEDY)
        stats = llm.stats()
    assert [one.token_ids for one in found] == answers
    assert stats.num_accepted_tokens > 30


@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("record_steps", [None, True], ids=["", "recorded"])
def test_a_text_that_repeats_is_the_same_on_every_shape(
    pool: RankPool, shape: tuple[int, int], record_steps: bool | None, tmp_path: Path
) -> None:
    reference = Reference(save_gpt2(tmp_path))
    prompts = [(5, 60, 7, 33, 9, 81), (11, 12, 40), tuple(range(20, 50))]
    arrivals = [
        Arrival(EngineRequest(request_id=str(number), prompt_ids=prompt, params=GREEDY), 3 * number)
        for number, prompt in enumerate(prompts)
    ]
    fields = {"max_num_seqs": 3, "max_draft_tokens": 7, "record_steps": record_steps}
    with pool.mesh(tmp_path, *shape, **fields) as mesh:
        served = mesh.serve(arrivals)
    for number, prompt in enumerate(prompts):
        assert served.token_ids(str(number)) == reference.greedy(prompt, GREEDY.max_tokens)
    assert served.stats.num_accepted_tokens > 0


def generated(max_draft_tokens: int, params: SamplingParams, **fields: Any) -> tuple[Completion, EngineStats]:
    with LLM("smollm2-135m", max_model_len=512, max_draft_tokens=max_draft_tokens, **fields) as llm:
        return llm.generate(TEXT, params)[0], llm.stats()


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_in_bfloat16_log_probabilities_are_the_same_to_the_bit(shape: tuple[int, int], temperature: float) -> None:
    fields = {"tensor_parallel_size": shape[0], "pipeline_parallel_size": shape[1], "num_threads": 1}
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=60, logprobs=2, ignore_eos=True)
    one_by_one, alone = generated(0, params, dtype="bfloat16", **fields)
    drafted, stats = generated(7, params, dtype="bfloat16", **fields)
    assert drafted == one_by_one
    assert alone.num_drafted_tokens == 0
    assert stats.num_accepted_tokens > 2
    assert stats.num_steps < alone.num_steps
