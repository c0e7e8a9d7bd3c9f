"""Beam search finds what transformers finds: by its rules alone, in every family, and whatever runs beside it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from shardray import LLM
from shardray.runtime.engine.beams import BeamSearch, Candidates, num_candidates
from shardray.runtime.engine.request import EngineRequest, FieldError, FinishReason, SamplingParams
from shardray.runtime.engine.scheduler import Scheduler
from shardray.runtime.engine.step import Sampled, StepResult
from tests.beam_reference import beam_search, stop_ids_of
from tests.engine.scheduling import LIMITS, add, planned
from tests.engine.test_same_tokens import make_arrivals
from tests.model.encoder_zoo import PAIRS, PairReference, save_encoder
from tests.model.zoo import ZOO, save
from tests.ranks import Arrival, RankPool
from tests.tiny_models import Reference, save_gpt2, save_llama

PROMPTS = [(5, 60, 7, 33, 9, 81), (11, 12, 40), tuple(range(20, 50))]
STOP_IDS = tuple(range(3, 90, 7))  # often enough among the best
SEARCHES = [
    SamplingParams(num_beams=4, max_tokens=20, stop_token_ids=STOP_IDS),
    SamplingParams(num_beams=2, max_tokens=20, min_tokens=6, length_penalty=0.0, stop_token_ids=STOP_IDS),
    SamplingParams(num_beams=3, max_tokens=24, length_penalty=2.0, early_stopping=True, stop_token_ids=STOP_IDS),
    SamplingParams(num_beams=5, max_tokens=16, repetition_penalty=1.3, stop_token_ids=STOP_IDS[:3]),
    SamplingParams(num_beams=3, max_tokens=16, length_penalty=-1.0, stop_token_ids=STOP_IDS, temperature=0.0),
    SamplingParams(num_beams=2, max_tokens=1),
]


class TableConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "table"


class TableModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """What comes next depends on the last token alone, as a table says: a model for the rules of a search."""

    config_class = TableConfig
    main_input_name = "input_ids"

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(TableConfig(vocab_size=len(table), num_hidden_layers=1, use_cache=False))
        self.table = torch.nn.Parameter(table, requires_grad=False)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return CausalLMOutput(logits=self.table[input_ids])


def found_in(table: torch.Tensor, first_id: int, params: SamplingParams) -> list[int]:
    """By BeamSearch."""
    stop_ids, logprobs = params.stop_token_ids, table.log_softmax(dim=-1)

    def candidates(last_id: int, num_generated: int) -> Candidates:
        barred_ids = stop_ids if num_generated < params.min_tokens else ()
        found = logprobs[last_id].index_fill(0, torch.tensor(barred_ids, dtype=torch.int64), -torch.inf)
        best, ids = found.topk(min(len(found), num_candidates(params.num_beams, len(stop_ids))))
        return [pair for pair in zip(ids.tolist(), best.tolist(), strict=True) if pair[1] > -torch.inf]

    search = BeamSearch(params, stop_ids, params.max_tokens)
    for num_generated in itertools.count():
        search.advance([candidates((first_id, *beam.token_ids)[-1], num_generated) for beam in search.beams])
        if search.is_over:
            assert (search.best.reason is FinishReason.STOP) == (search.best.token_ids[-1] in stop_ids)
            return list(search.best.token_ids)
    raise AssertionError


@st.composite
def any_search(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 12))
    return SamplingParams(
        num_beams=draw(st.integers(2, 6)),
        length_penalty=draw(st.sampled_from([-2.0, 0.0, 0.6, 1.0, 2.0])),
        early_stopping=draw(st.booleans()),
        max_tokens=max_tokens,
        min_tokens=draw(st.sampled_from([0, max_tokens // 2])),
        stop_token_ids=tuple(sorted(draw(st.sets(st.integers(0, 39), min_size=1, max_size=12)))),
        ignore_eos=True,
    )


@given(params=any_search(), seed=st.integers(0, 2**32), spread=st.sampled_from([0.3, 2.0, 5.0]))
@settings(max_examples=60)
def test_the_rules_are_those_of_transformers(params: SamplingParams, seed: int, spread: float) -> None:
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed)) * spread
    assert found_in(table, 7, params) == beam_search(TableModel(table).eval(), [7], params)


def test_of_texts_that_end_at_once_only_those_among_the_best_count() -> None:
    search = BeamSearch(SamplingParams(num_beams=2), {0, 1, 2}, 10)
    search.advance([[(5, -1.0), (6, -2.0), (0, -3.0), (7, -4.0)]])
    assert [beam.token_ids for beam in search.beams] == [(5,), (6,)]
    assert search.ended == []
    search.advance([[(0, -1.0), (8, -2.0)], [(1, -0.5), (9, -9.0), (2, -9.5)]])
    assert [(one.token_ids, one.score, one.reason) for one in search.ended] == [
        ((5, 0), -1.0, FinishReason.STOP),
        ((6, 1), -1.25, FinishReason.STOP),
    ]
    assert [(beam.token_ids, beam.parent) for beam in search.beams] == [((5, 8), 0), ((6, 9), 1)]
    assert search.is_over, "the best that goes on has -3 over 2 tokens"


def check_all(llm: LLM, model: Any, searches: Sequence[SamplingParams] = tuple(SEARCHES)) -> None:
    """All together, and beside requests that do not search."""
    pairs = list(itertools.product(PROMPTS[::2], searches))
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    sampled = SamplingParams(seed=5, max_tokens=16, ignore_eos=True)
    alone = llm.generate([PROMPTS[0]] * 2, [greedy, sampled])
    prompts = [PROMPTS[0], *(prompt for prompt, _ in pairs), PROMPTS[0]]
    first, *found, last = llm.generate(prompts, [greedy, *(params for _, params in pairs), sampled])
    assert [first.token_ids, last.token_ids] == [one.token_ids for one in alone]
    for (prompt, params), completion in zip(pairs, found, strict=True):
        assert completion.token_ids == beam_search(model, prompt, params), params
        stops = completion.token_ids[-1] in stop_ids_of(model, params)
        assert completion.finish_reason is (FinishReason.STOP if stops else FinishReason.LENGTH)
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_pages, stats.num_cached_tokens) == (0, 0, 0, 0)
    assert stats.num_output_tokens == sum(len(one.token_ids) for one in (*alone, first, *found, last))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2, windows", "deepseek-v2", "falcon, alibi"])
def test_a_family_finds_what_transformers_finds(name: str, tmp_path: Path) -> None:
    assert name in ZOO
    reference = Reference(save(name, tmp_path))
    with LLM(tmp_path, device="cpu", dtype="float32", max_num_seqs=9, max_num_batched_tokens=24) as llm:
        check_all(llm, reference.model)


@pytest.mark.parametrize("name", ["t5", "bart", "m2m100"])
def test_a_decoder_behind_an_encoder_finds_what_transformers_finds(name: str, tmp_path: Path) -> None:
    assert name in PAIRS
    reference = PairReference(save_encoder(name, tmp_path))
    forced = [msgspec.structs.replace(params, forced_token_ids=(50,)) for params in SEARCHES[:3]]
    with LLM(tmp_path, device="cpu", dtype="float32", max_num_seqs=9, max_model_len=64) as llm:
        check_all(llm, reference.model, [*SEARCHES, *(forced if name == "m2m100" else [])])


def searches_among(arrivals: list[Arrival]) -> list[Arrival]:
    """Every other request searches."""
    found = []
    for number, arrival in enumerate(arrivals):
        params = SEARCHES[number // 2 % 5] if number % 2 == 0 else arrival.request.params
        found.append(Arrival(msgspec.structs.replace(arrival.request, params=params), arrival.after_step))
    return found


def expected_of(reference: Reference | PairReference, request: EngineRequest) -> list[int]:
    if request.params.num_beams > 1:
        return beam_search(reference.model, request.prompt_ids, request.params)
    return reference.greedy(request.prompt_ids, request.params.max_tokens)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("record_steps", [None, True], ids=["", "recorded"])
def test_a_search_finds_the_same_on_every_shape(
    pool: RankPool, shape: tuple[int, int], record_steps: bool | None, tmp_path: Path
) -> None:
    reference = Reference(save_gpt2(tmp_path))
    arrivals = searches_among(make_arrivals(250, [1, 2, 15, 16, 17, 40, 130, 33], max_tokens=12))
    fields = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "max_draft_tokens": 3, "record_steps": record_steps}
    with pool.mesh(tmp_path, *shape, **fields) as mesh:
        served = mesh.serve(arrivals)
    for arrival in arrivals:
        request = arrival.request
        assert served.token_ids(request.request_id) == expected_of(reference, request), request
    assert served.stats.num_used_pages == 0


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_a_pair_searches_on_every_shape(pool: RankPool, shape: tuple[int, int], tmp_path: Path) -> None:
    reference = PairReference(save_encoder("bart", tmp_path))
    arrivals = searches_among(make_arrivals(97, [1, 2, 15, 16, 17, 40, 50], max_tokens=12))
    with pool.mesh(tmp_path, *shape, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64) as mesh:
        served = mesh.serve(arrivals)
    for arrival in arrivals:
        assert served.token_ids(arrival.request.request_id) == expected_of(reference, arrival.request)
    assert served.stats.num_used_pages == 0


def test_preemption_for_want_of_pages_changes_nothing_that_is_found(pool: RankPool, tmp_path: Path) -> None:
    reference = Reference(save_llama(tmp_path))
    params = SamplingParams(num_beams=3, max_tokens=50, stop_token_ids=STOP_IDS[:2])
    arrivals = make_arrivals(250, [40, 30, 20, 35, 25], max_tokens=60)
    arrivals = [
        Arrival(msgspec.structs.replace(arrival.request, params=params if number % 2 else arrival.request.params))
        for number, arrival in enumerate(arrivals)
    ]
    with pool.mesh(tmp_path, 1, 1, max_model_len=128, max_num_seqs=2) as mesh:
        page_bytes = mesh.infos[0].kv_bytes // (mesh.infos[0].num_kv_tokens // 16)
    with pool.mesh(tmp_path, 1, 1, max_model_len=128, kv_memory_bytes=20 * page_bytes, max_num_seqs=8) as mesh:
        served = mesh.serve(arrivals)
    assert served.stats.num_preemptions > 0
    for arrival in arrivals:
        assert served.token_ids(arrival.request.request_id) == expected_of(reference, arrival.request)
    assert served.stats.num_used_pages == 0


def test_a_search_that_is_dropped_frees_its_pages_and_the_rest_goes_on(tmp_path: Path) -> None:
    reference = Reference(save_llama(tmp_path))
    params = SamplingParams(num_beams=4, max_tokens=400, ignore_eos=True)
    with LLM(tmp_path, device="cpu", dtype="float32", max_num_seqs=9) as llm:
        streams = llm.streams()
        streams.add(PROMPTS[0], params)
        while llm.stats().num_steps < 40:
            assert streams.poll(0.01) == [], "nothing is there before the search is over"
        assert llm.stats().num_used_pages > 4
        streams.close()
        assert llm.generate(PROMPTS[1], SEARCHES[0])[0].token_ids == beam_search(
            reference.model, PROMPTS[1], SEARCHES[0]
        )
        assert llm.stats().num_used_pages == 0


def test_tokens_that_were_sent_before_are_not_sent_again() -> None:
    """A mesh was lost while it told what a search had found."""
    candidates = tuple((token_id, -float(token_id)) for token_id in range(3, 9))
    for num_sent in range(5):
        scheduler = Scheduler(LIMITS)
        add(scheduler, "a", generated_ids=(3, 3, 3, 3)[:num_sent], params=SamplingParams(num_beams=2, max_tokens=4))
        outputs = []
        while scheduler.has_work:
            plan = planned(scheduler)
            assert outputs == []
            sampled = tuple(Sampled(3, None, candidates) for row in plan.rows if row.samples)
            outputs = scheduler.commit(StepResult(plan.step, sampled))
        assert [output.token_id for output in outputs] == ([3] * (4 - num_sent) or [None])
        assert [output.finish_reason for output in outputs][-1] is FinishReason.LENGTH
        scheduler.check_idle()


def test_logits_that_are_not_finite_end_a_search() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a", params=SamplingParams(num_beams=2, max_tokens=4))
    [output] = scheduler.commit(StepResult(planned(scheduler).step, (Sampled(-1),)))
    assert output.finish_reason is FinishReason.ERROR
    scheduler.check_idle()


def test_beams_that_can_never_run_together_are_refused_by_name() -> None:
    with pytest.raises(FieldError, match=r"^num_beams: 5 exceeds the 4 of engine\.max_num_seqs"):
        add(Scheduler(LIMITS), "a", params=SamplingParams(num_beams=5))
    with pytest.raises(FieldError, match=r"^num_beams: prompt of 4 tokens \+ 4 times max_tokens 80 exceeds the 256"):
        add(Scheduler(LIMITS), "a", params=SamplingParams(num_beams=4, max_tokens=80))
    assert add(Scheduler(LIMITS), "a", params=SamplingParams(num_beams=4, max_tokens=60)) is None


def test_beams_share_the_pages_that_are_full_and_have_a_copy_of_the_last() -> None:
    scheduler = Scheduler(LIMITS)
    add(scheduler, "a", prompt_len=6, params=SamplingParams(num_beams=3, max_tokens=20))
    plan = planned(scheduler)
    own_pages = plan.grants[0].pages
    candidates = tuple((token_id, -float(token_id)) for token_id in range(3, 9))
    scheduler.commit(StepResult(plan.step, (Sampled(3, None, candidates),)))
    plan = planned(scheduler)
    assert [source for source, _ in plan.copies] == [own_pages[1]] * 2
    assert [(grant.first_block, grant.pages[0]) for grant in plan.grants] == [(0, own_pages[0])] * 2
    assert [row.token_ids for row in plan.rows] == [(3,), (4,), (5,)]
    assert scheduler.stats().num_used_pages == 1 + 3
    assert scheduler.stats().num_cached_tokens == 4 + 3 * 3
    scheduler.check_integrity()
    assert scheduler.cancel("a") is not None
    assert scheduler.commit(StepResult(plan.step, (Sampled(3, None, candidates),) * 3)) == []
    scheduler.check_idle()


def test_of_what_a_search_computed_others_find_what_was_given_and_nothing_that_beams_wrote() -> None:
    scheduler = Scheduler(replace(LIMITS, prefix_caching=True))
    add(scheduler, "a", prompt_len=6, params=SamplingParams(num_beams=3, max_tokens=20))
    candidates = tuple((token_id, -float(token_id)) for token_id in range(3, 9))
    outputs = []
    while scheduler.has_work:
        plan = planned(scheduler)
        sampled = tuple(Sampled(3, None, candidates) for row in plan.rows if row.samples)
        outputs = scheduler.commit(StepResult(plan.step, sampled))
    prompt_ids = (*range(100, 106), *(output.token_id for output in outputs if output.token_id is not None))
    scheduler.add(EngineRequest(request_id="b", prompt_ids=prompt_ids, params=SamplingParams()))
    assert [(row.start, row.num_tokens) for row in planned(scheduler).rows] == [(4, 16)]


def test_searches_of_many_widths_share_one_batch_with_others(tmp_path: Path) -> None:
    chance = random.Random(4)
    reference = Reference(save_llama(tmp_path))
    params = [SamplingParams(num_beams=2 + number % 7, max_tokens=8, min_tokens=number % 3) for number in range(14)]
    prompts = [tuple(chance.randrange(3, 250) for _ in range(chance.randint(1, 40))) for _ in params]
    with LLM(tmp_path, device="cpu", dtype="float32", max_num_seqs=20) as llm:
        for prompt, own, completion in zip(prompts, params, llm.generate(prompts, params), strict=True):
            assert completion.token_ids == beam_search(reference.model, prompt, own)
