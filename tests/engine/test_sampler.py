"""The sampler against `transformers`, and what it promises beyond: rows depend on no other row and no interruption."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shardray.runtime.engine import race
from shardray.runtime.engine.candidates import survivors
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.engine.sampler import Sampler
from shardray.runtime.engine.step import Sampled, SlotStart

CPU = torch.device("cpu")
EOS = (2, 5)
Ids = tuple[int, ...]


def start(slot: int, params: SamplingParams, prompt: Ids = (), generated: Ids = ()) -> SlotStart:
    return SlotStart(slot, params, prompt, generated, len(generated))


def sample(
    sampler: Sampler, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]
) -> tuple[torch.Tensor, list[Sampled]]:
    """Draw a token for each row, and read what was drawn."""
    draw = sampler.draw(logits, list(zip(slots, positions, strict=True)))
    return draw.tokens, draw.read([tensor.cpu() for tensor in draw.tensors()])


def sample_one(logits: torch.Tensor, params: SamplingParams, prompt: Ids = (), generated: Ids = ()) -> Sampled:
    """One token after ``prompt`` and ``generated``. ``logits``: (vocab_size,)"""
    sampler = Sampler(len(logits), EOS, CPU)
    sampler.start(start(0, params, prompt, generated))
    tokens, sampled = sample(sampler, logits[None].clone(), [0], [len(prompt) + len(generated)])
    assert tokens.tolist() == [sampled[0].token_id]
    assert tokens.dtype == torch.int64
    return sampled[0]


def peaked_logits(vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def reference_scores(
    logits: torch.Tensor, params: SamplingParams, prompt: Ids = (), generated: Ids = ()
) -> torch.Tensor:
    """What `transformers` makes of the logits, in float64. (vocab_size,)"""
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[i], b] for i, b in params.logit_bias.items()]))
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        barred = [*EOS, *params.stop_token_ids]
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, barred, device="cpu"))
    if not params.greedy:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([[*prompt, *generated]]), logits.double()[None].clone())[0]


def check_against_reference(logits: torch.Tensor, params: SamplingParams, prompt: Ids, generated: Ids) -> None:
    """The reported logprobs are those of `transformers`, and the token is one that it would keep."""
    sampled = sample_one(logits, params, prompt, generated)
    expected = reference_scores(logits, params, prompt, generated).log_softmax(dim=-1)
    tolerance = 1e-5 + 1e-5 / (params.temperature or 1.0)
    resolution = 4 * torch.finfo(torch.float32).eps  # of a logprob that a bias has pushed to minus a thousand
    assert sampled.logprob == pytest.approx(float(expected[sampled.token_id]), abs=tolerance, rel=resolution)
    if params.greedy:
        assert sampled.token_id == int(expected.argmax())
    top = sampled.top_logprobs
    assert len(top) == min(params.logprobs or 0, int(expected.isfinite().sum()))
    assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
    best = expected.sort(descending=True).values[: len(top)].tolist()
    assert [value for _, value in top] == pytest.approx(best, abs=tolerance, rel=resolution)
    theirs = [float(expected[i]) for i, _ in top]
    assert [value for _, value in top] == pytest.approx(theirs, abs=tolerance, rel=resolution)


@st.composite
def random_params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    ids = st.integers(0, vocab_size - 1)
    biases = st.integers(-6400, 6400).map(lambda number: number / 64)  # apart from each other by more than roundings
    max_tokens = 16
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.3, 5.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 40, 64, 65, 900, 2000, 10**6])),
        top_p=draw(st.one_of(st.just(1.0), st.floats(0.01, 0.999))),
        min_p=draw(st.one_of(st.just(0.0), st.floats(1e-4, 1.0))),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 1.2, 2.0])),
        logit_bias=draw(st.dictionaries(ids, biases, max_size=5)),
        seed=draw(st.integers(0, 2**64 - 1)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=tuple(draw(st.lists(ids, max_size=3))),
        logprobs=draw(st.integers(0, 20)),
    )


@settings(max_examples=150)
@given(st.data())
def test_logprobs_are_those_of_transformers_for_any_settings(data):
    vocab_size = data.draw(st.sampled_from([40, 100, 3000]))
    params = data.draw(random_params(vocab_size))
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=12)
    prompt, generated = tuple(data.draw(tokens)) or (1,), tuple(data.draw(tokens))
    logits = peaked_logits(vocab_size, data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.3, 3.0, 10.0])))
    check_against_reference(logits, params, prompt, generated)


@settings(max_examples=60)
@given(
    levels=st.sampled_from([2, 3, 16]),
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([0, 1, 5, 60, 300]),
    top_p=st.integers(5, 94).map(lambda percent: percent / 100 + 0.00123457),  # never reached exactly
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_as_many_tokens_survive_as_in_transformers_when_many_logits_are_equal(levels, seed, top_k, top_p, min_p):
    logits = torch.randint(levels, (3000,), generator=torch.Generator().manual_seed(seed)).float()
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    (candidates,) = survivors((logits - logits.max())[None], [params])
    kept = candidates.token_ids[candidates.scores.isfinite()]
    expected = logits[reference_scores(logits, params).isfinite()]
    assert logits[kept].tolist() == expected.sort(descending=True).values.tolist()
    # Of the level at which top_p cuts, the lower ids stay.
    lowest = kept[logits[kept] == logits[kept].min()]
    assert lowest.tolist() == torch.nonzero(logits == logits[kept].min()).view(-1)[: len(lowest)].tolist()


@pytest.mark.parametrize("fields", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.01}, {}])
@pytest.mark.parametrize("temperature", [0.5, 20.0])
def test_tokens_come_up_as_often_as_their_probability(fields, temperature):
    num_draws, vocab_size = 10_000, 1200
    logits = peaked_logits(vocab_size, 4, 2.0)
    params = SamplingParams(temperature=temperature, seed=9, **fields)
    sampler = Sampler(vocab_size, EOS, CPU)
    counts = torch.zeros(vocab_size)
    for first in range(0, num_draws, 500):
        for slot in range(500):
            sampler.start(start(slot, params))
        tokens, _ = sample(sampler, logits.expand(500, -1).clone(), range(500), range(first, first + 500))
        counts += torch.bincount(tokens, minlength=vocab_size)
    expected = reference_scores(logits, params).softmax(dim=-1) * num_draws
    assert not counts[expected == 0].any()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    ideal = torch.cat([expected[common], expected[~common].sum()[None]]).clamp(min=1e-9)
    observed, ideal = observed[ideal > 1], ideal[ideal > 1]
    freedom = max(len(ideal) - 1, 1)
    assert (float(((observed - ideal) ** 2 / ideal).sum()) - freedom) / math.sqrt(2 * freedom) < 5


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=50, logprobs=5),
    SamplingParams(seed=3, top_p=0.9, logprobs=20),
    SamplingParams(seed=4, top_p=0.9, temperature=8.0, logprobs=20),  # needs the full sort
    SamplingParams(seed=5, min_p=0.05, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, presence_penalty=1.0, logprobs=3),
    SamplingParams(seed=6, logit_bias={3: 5.0, 90: -100.0}, logprobs=0, min_tokens=4, stop_token_ids=(7,)),
    SamplingParams(seed=7, top_k=2000, top_p=0.5, logprobs=20),
    SamplingParams(temperature=0.0, logprobs=20, logit_bias={11: 1.0}),
]


def run_rows(rows: list[int], num_steps: int, vocab_size: int, rounding: float = 0.0) -> dict[int, list[Sampled]]:
    """Sample ``rows`` of MIXED together for some steps, each on logits of its own."""
    sampler = Sampler(vocab_size, EOS, CPU)
    outputs: dict[int, list[Sampled]] = {row: [] for row in rows}
    for row in rows:
        sampler.start(start(row, MIXED[row], (row, 8, 8)))
    for step in range(num_steps):
        logits = torch.stack([peaked_logits(vocab_size, 1000 * row + step) for row in rows])
        _, sampled = sample(sampler, logits + rounding * torch.randn_like(logits), rows, [3 + step] * len(rows))
        for row, entry in zip(rows, sampled, strict=True):
            outputs[row].append(entry)
    return outputs


def test_a_row_gives_the_same_bits_whoever_shares_its_batch():
    rows = list(range(len(MIXED)))
    together = run_rows(rows, 6, 49_153)
    for row in rows:
        assert run_rows([row], 6, 49_153)[row] == together[row]
    backwards = run_rows(rows[::-1], 6, 49_153)
    assert backwards == together
    assert run_rows([4, 1, 7], 6, 49_153) == {row: together[row] for row in (4, 1, 7)}


def test_differences_in_the_low_bits_of_logits_do_not_change_tokens():
    rows = list(range(len(MIXED)))
    exact, rounded = run_rows(rows, 40, 1000), run_rows(rows, 40, 1000, rounding=1e-6)
    for row in rows:
        assert [entry.token_id for entry in exact[row]] == [entry.token_id for entry in rounded[row]]


@pytest.mark.parametrize("row", range(len(MIXED)))
def test_a_request_that_lost_its_slot_goes_on_as_if_nothing_had_happened(row):
    vocab_size, prompt = 500, (4, 4, 9)
    logits = [peaked_logits(vocab_size, step, 1.0) for step in range(10)]
    whole = Sampler(vocab_size, EOS, CPU)
    whole.start(start(0, MIXED[row], prompt))
    expected = [sample(whole, logits[i][None].clone(), [0], [3 + i])[1][0] for i in range(10)]
    for cut in (1, 3, 7):
        resumed = Sampler(vocab_size, EOS, CPU)
        resumed.start(start(2, MIXED[5], (1, 2, 3)))  # what the slot held before does not matter
        sample(resumed, logits[0][None].clone(), [2], [3])
        resumed.start(start(2, MIXED[row], prompt, tuple(entry.token_id for entry in expected[:cut])))
        assert [sample(resumed, logits[i][None].clone(), [2], [3 + i])[1][0] for i in range(cut, 10)] == expected[cut:]


def test_penalties_count_the_tokens_as_they_are_sampled():
    params = SamplingParams(temperature=0.0, frequency_penalty=0.75, presence_penalty=0.5, max_tokens=8, logprobs=2)
    sampler = Sampler(10, EOS, CPU)
    sampler.start(start(0, params, (1, 1)))
    logits = torch.tensor([[4.0, 3.9, 3.5, 0, 0, 0, 0, 0, 0, 0]])
    tokens = [sample(sampler, logits.clone(), [0], [2 + i])[1][0].token_id for i in range(6)]
    # The prompt does not count. 0: 4 → 2.75 → 2.0; 1: 3.9 → 2.65 → 1.9; 2: 3.5 → 2.25 → 1.5
    assert tokens == [0, 1, 2, 0, 1, 2]
    assert sample(sampler, logits.clone(), [0], [8])[1][0].top_logprobs[0][0] == 0


def test_repetition_penalty_sees_the_prompt_and_the_output():
    logits = torch.tensor([3.0, 2.9, 2.0, -1.0, -1.1])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logprobs=5)
    assert sample_one(logits, params, (0,)).token_id == 1
    assert sample_one(logits, params, (0,), (1,)).token_id == 2
    scores = dict(sample_one(logits, params, (0, 3), (1, 1)).top_logprobs)
    expected = torch.tensor([1.5, 1.45, 2.0, -2.0, -1.1]).log_softmax(dim=-1).tolist()
    assert [scores[i] for i in range(5)] == pytest.approx(expected, abs=1e-6)


def test_penalties_of_long_and_short_rows_follow_their_definition():
    vocab_size = 2000
    ids = torch.randint(vocab_size, (4, 1500), generator=torch.Generator().manual_seed(3))
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, presence_penalty=-0.4, frequency_penalty=0.3, logprobs=20
    )
    contexts = [
        (tuple(row[:n].tolist()), tuple(row[n : 2 * n].tolist())) for row, n in zip(ids, (1, 40, 700, 3), strict=True)
    ]
    sampler = Sampler(vocab_size, EOS, CPU)
    for slot, context in enumerate(contexts):
        sampler.start(start(3 * slot, params, *context))
    for step in range(5):
        logits = torch.stack([peaked_logits(vocab_size, 10 * step + row) for row in range(4)])
        _, sampled = sample(sampler, logits.clone(), [0, 3, 6, 9], [0] * 4)
        for row, (prompt, generated) in enumerate(contexts):
            counts = torch.bincount(torch.tensor(generated), minlength=vocab_size).double()
            scores = reference_scores(logits[row], params, prompt, generated) - 0.3 * counts + 0.4 * (counts > 0)
            best = scores.log_softmax(dim=-1).sort(descending=True)
            assert [i for i, _ in sampled[row].top_logprobs] == best.indices[:20].tolist()
            assert [v for _, v in sampled[row].top_logprobs] == pytest.approx(best.values[:20].tolist(), abs=1e-5)
            contexts[row] = (prompt, (*generated, sampled[row].token_id))


def test_neither_eos_nor_stop_ids_come_before_min_tokens():
    logits = torch.zeros(10)
    logits[2], logits[5], logits[7], logits[4] = 9.0, 8.0, 7.0, 1.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(7,), logprobs=10)
    sampler = Sampler(10, EOS, CPU)
    sampler.start(start(0, params))
    sampled = [sample(sampler, logits[None].clone(), [0], [i])[1][0] for i in range(3)]
    assert [entry.token_id for entry in sampled] == [4, 4, 2]
    assert not {2, 5, 7} & {token_id for token_id, _ in sampled[1].top_logprobs}
    assert len(sampled[1].top_logprobs) == 7


def test_min_tokens_counts_the_tokens_that_an_earlier_start_generated():
    logits = torch.tensor([0.0, 0.0, 9.0, 0.0, 1.0, 0.0])
    params = SamplingParams(temperature=0.0, min_tokens=3)
    assert sample_one(logits, params, (), (1, 1)).token_id == 4
    assert sample_one(logits, params, (), (1, 1, 1)).token_id == 2


def test_greedy_takes_the_lowest_id_among_equal_logits():
    logits = torch.zeros(5000)
    logits[[70, 71, 4000]] = 1.0
    assert sample_one(logits, SamplingParams(temperature=0.0)) == Sampled(70)
    with_logprobs = sample_one(logits, SamplingParams(temperature=0.0, logprobs=2))
    assert with_logprobs.token_id == 70
    assert [token_id for token_id, _ in with_logprobs.top_logprobs] == [70, 71]


def test_greedy_ignores_the_filters():
    logits = peaked_logits(300, 0)
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, logprobs=20)
    assert len(sample_one(logits, params).top_logprobs) == 20


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 5e-324])
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_tiny_temperature_is_greedy_and_stays_finite(temperature, fields):
    logits = peaked_logits(2000, 8) * 10
    sampled = sample_one(logits, SamplingParams(temperature=temperature, logprobs=3, seed=5, **fields))
    assert sampled.token_id == int(logits.argmax())
    assert sampled.logprob == pytest.approx(0.0, abs=1e-6)
    assert all(math.isfinite(value) for _, value in sampled.top_logprobs)


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_one_survivor_is_always_chosen(fields):
    for seed in range(200):
        logits = peaked_logits(300, seed)
        sampled = sample_one(logits, SamplingParams(temperature=100.0, seed=seed, logprobs=20, **fields))
        assert sampled == Sampled(int(logits.argmax()), 0.0, ((int(logits.argmax()), 0.0),))


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 70}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_tokens_at_minus_infinity_are_never_chosen_nor_reported(fields):
    logits = torch.full((3000,), -torch.inf)
    logits[[10, 2999]] = torch.tensor([0.0, 0.1])
    for seed in range(50):
        sampled = sample_one(logits, SamplingParams(seed=seed, logprobs=20, **fields))
        assert sampled.token_id in (10, 2999)
        assert {token_id for token_id, _ in sampled.top_logprobs} <= {10, 2999}


def test_all_logits_equal_draws_from_the_whole_vocabulary():
    logits = torch.zeros(4000)
    for fields in ({}, {"top_p": 0.99}, {"top_k": 3}, {"min_p": 1.0}):
        tokens = {sample_one(logits, SamplingParams(seed=seed, **fields)).token_id for seed in range(60)}
        assert len(tokens) > 50
        assert max(tokens) > 3000 > 1000 > min(tokens)


def test_the_seed_and_the_position_alone_decide_a_draw():
    logits = torch.zeros(4000)
    draws = {(seed, n): sample_one(logits, SamplingParams(seed=seed), (1,) * n) for seed in range(8) for n in range(8)}
    again = {(seed, n): sample_one(logits, SamplingParams(seed=seed), (1,) * n) for seed in range(8) for n in range(8)}
    assert draws == again
    assert len({entry.token_id for entry in draws.values()}) > 55


def test_logprobs_come_only_where_they_are_asked_for():
    sampler = Sampler(100, EOS, CPU)
    for slot, logprobs in enumerate((None, 0, 2)):
        sampler.start(start(slot, SamplingParams(seed=1, logprobs=logprobs)))
    _, (none, chosen, top) = sample(sampler, peaked_logits(100, 1).expand(3, -1).clone(), [0, 1, 2], [4, 4, 4])
    assert none == Sampled(none.token_id)
    assert chosen == Sampled(none.token_id, top.logprob)
    assert len(top.top_logprobs) == 2


def test_no_rows_give_no_tokens():
    tokens, sampled = sample(Sampler(100, EOS, CPU), torch.zeros(0, 100), [], [])
    assert tokens.shape == (0,)
    assert sampled == []


@pytest.mark.gpu
def test_cuda_gives_the_tokens_of_the_cpu():
    rows = list(range(len(MIXED)))
    results = []
    for device in (CPU, torch.device("cuda")):
        sampler = Sampler(49_152, EOS, device)
        for row in rows:
            sampler.start(start(row, MIXED[row], (row, 8, 8)))
        tokens = []
        for step in range(20):
            logits = torch.stack([peaked_logits(49_152, 1000 * row + step) for row in rows]).to(device)
            tokens.append(sample(sampler, logits, rows, [3 + step] * len(rows))[0].tolist())
        results.append(tokens)
    assert results[0] == results[1]


@settings(max_examples=100)
@given(st.data())
def test_what_is_compiled_draws_what_torch_draws(data):
    """Tokens, and logprobs of those that the filters keep: what a CPU does against what a GPU does."""
    vocab_size = data.draw(st.sampled_from([40, 100, 3000]))
    picked = [data.draw(random_params(vocab_size)) for _ in range(data.draw(st.integers(1, 40)))]
    scale, seed = data.draw(st.sampled_from([0.3, 3.0, 10.0])), data.draw(st.integers(0, 10**6))
    logits = torch.stack([peaked_logits(vocab_size, seed + row, scale) for row in range(len(picked))])
    if are_round := data.draw(st.booleans()):
        logits = logits.round()  # many are equal, and any of them among the best; no top_p may be reached exactly
        picked = [msgspec.structs.replace(p, top_p=0.95 * p.top_p + 0.0012345) if p.top_p < 1 else p for p in picked]
    rows, found = list(range(len(picked))), []
    for kernel in (race.prepare_draw(CPU), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(race, "prepare_draw", lambda device, kernel=kernel: kernel)
            sampler = Sampler(vocab_size, EOS, CPU)
            for row, params in enumerate(picked):
                sampler.start(start(row, params, (0,)))
            found.append(sample(sampler, logits.clone(), rows, [1] * len(rows))[1])
    for compiled, by_torch in zip(*found, strict=True):
        assert compiled.token_id == by_torch.token_id
        assert compiled.logprob == pytest.approx(by_torch.logprob, abs=1e-3)
        best, best_by_torch = dict(compiled.top_logprobs), dict(by_torch.top_logprobs)
        assert [*best.values()] == pytest.approx([*best_by_torch.values()], abs=1e-3)
        assert are_round or [*best] == [*best_by_torch]


def test_filters_and_temperatures_of_neighbours_change_nothing_of_a_row():
    logits = torch.stack([peaked_logits(5000, row) for row in range(8)])
    picked = [msgspec.structs.replace(params, logprobs=20) for params in MIXED][:8]
    together = Sampler(5000, EOS, CPU, num_threads=2)
    for row, params in enumerate(picked):
        together.start(start(row, params, (row, 8, 8)))
    _, found = sample(together, logits[: len(picked)].clone(), list(range(len(picked))), [3] * len(picked))
    assert found == [sample_one(logits[row], params, (row, 8, 8)) for row, params in enumerate(picked)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_says_so_and_its_neighbour_goes_on(value):
    logits = torch.stack([peaked_logits(300, 0), peaked_logits(300, 1)])
    expected = sample_one(logits[1], SamplingParams(seed=3, top_p=0.9))
    logits[0, 7] = value
    sampler = Sampler(300, EOS, CPU)
    for row in range(2):
        sampler.start(start(row, SamplingParams(seed=3, top_p=0.9)))
    assert sample(sampler, logits, [0, 1], [0, 0])[1] == [Sampled(-1), expected]


def test_tokens_that_are_barred_are_never_drawn_and_a_row_of_them_alone_ends_nothing():
    logits = torch.full((400,), -math.inf)
    logits[[5, 9]] = 0.0
    drawn = {sample_one(logits, SamplingParams(seed=seed, top_k=3, top_p=0.99)).token_id for seed in range(40)}
    assert drawn == {5, 9}
    assert 0 <= sample_one(torch.full((400,), -math.inf), SamplingParams(seed=1)).token_id < 400


def test_a_beam_is_given_the_best_log_probabilities_and_what_is_barred_had_its_share() -> None:
    params = SamplingParams(num_beams=4, min_tokens=1, stop_token_ids=(7,), repetition_penalty=1.5, logit_bias={9: 1.5})
    logits = peaked_logits(300, seed=1)
    logprobs = logits.log_softmax(dim=-1)
    logprobs[9] += 1.5
    logprobs[[11, 12]] *= 1.5
    logprobs[[7, *EOS]] = -torch.inf
    found = sample_one(logits, params, prompt=(11, 12))
    best = logprobs.topk(4 + len(EOS) + 1)
    assert [token_id for token_id, _ in found.top_logprobs] == best.indices.tolist()
    assert [logprob for _, logprob in found.top_logprobs] == pytest.approx(best.values.tolist(), rel=1e-6)
    assert (found.token_id, found.logprob) == found.top_logprobs[0]


def test_what_a_beam_is_given_does_not_depend_on_the_rows_beside_it() -> None:
    all_params = [
        SamplingParams(num_beams=3),
        SamplingParams(seed=3, logprobs=2),
        SamplingParams(num_beams=16, stop_token_ids=(9, 10)),
        SamplingParams(temperature=0.0),
        SamplingParams(num_beams=3),
    ]
    logits = torch.stack([peaked_logits(500, seed) for seed in range(5)])
    logits[4] = torch.nan
    sampler = Sampler(500, EOS, CPU)
    for slot, params in enumerate(all_params):
        sampler.start(start(slot, params))
    _, together = sample(sampler, logits.clone(), range(5), [0] * 5)
    for slot, params in enumerate(all_params[:4]):
        assert together[slot] == sample_one(logits[slot], params)
    assert together[4].token_id == -1
    assert [len(one.top_logprobs) for one in together] == [5, 2, 20, 0, 0]
