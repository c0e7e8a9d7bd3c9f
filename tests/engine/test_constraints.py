"""Constrained text: the tokens that transformers chooses among those that may come next, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray import LLM, SamplingParams
from shardray.runtime.engine.constraints import Constraints
from shardray.runtime.engine.request import Constraint, EngineRequest, FieldError, FinishReason
from shardray.runtime.engine.step import NOT_YET
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer
from tests.chaos.tiny import save_tiny
from tests.model.gguf_writing import tiny_llama, write_gguf
from tests.ranks import Arrival, RankPool
from tests.stub_tokenizer import EOS_ID
from tests.tiny_models import Reference, one_thread, save_llama

SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2)]
PATTERNS = [
    r"[a-f]{3}-[0-9]{2,5}x?",
    r"(ab|ba)*c",
    r"\{\"[a-z]+\": (true|false|null|-?[1-9][0-9]*)\}",
    r"([A-Z][a-z]+ ){2,9}[.]",
    "yes|no|maybe",
]
PROMPT = tuple(b"What now? ")
SCHEMAS: list[Any] = [
    {"type": "object"},
    {"type": "integer", "minimum": 17, "maximum": 4711},
    {"enum": ["red", "gr\u00fcn", 3, None]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "born": {"type": "string", "format": "date"},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/link"}]},
        },
        "required": ["name", "born", "next"],
        "additionalProperties": False,
        "$defs": {"link": {"type": "object", "properties": {"to": {"const": "end"}}, "required": ["to"]}},
    },
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def llm(tiny: Reference) -> Iterator[LLM]:
    with LLM(tiny.folder, dtype="float32", num_threads=1) as llm:
        yield llm


@cache
def _alphabet(folder: Path) -> list[bytes]:
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.piece(token_id) for token_id in range(256)]


@one_thread()
@torch.inference_mode()
def expected_ids(reference: Reference, pattern: str, max_tokens: int) -> tuple[int, ...]:
    """By transformers, and by the package regex, which knows whether a text can still become one that matches."""
    alphabet, compiled = _alphabet(reference.folder), regex.compile(pattern)

    def next_ids(batch: int, ids: torch.Tensor) -> list[int]:
        text = b"".join(alphabet[token_id] for token_id in ids[len(PROMPT) :].tolist())
        able = [i for i in range(256) if alphabet[i].isascii() and _may_match(compiled, text + alphabet[i])]
        return able + [EOS_ID] * bool(compiled.fullmatch(text.decode()))

    ids = torch.tensor([PROMPT])
    out = reference.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
        eos_token_id=EOS_ID, pad_token_id=0, prefix_allowed_tokens_fn=next_ids,
    )  # fmt: skip
    return tuple(out[0, len(PROMPT) :].tolist())


def _may_match(compiled: Any, text: bytes) -> bool:
    return bool(compiled.fullmatch(text.decode(), partial=True))


def constrained(request_id: str, pattern: str, max_tokens: int = 24, **fields: Any) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, regex=pattern, seed=0)
    return EngineRequest(request_id=request_id, prompt_ids=PROMPT, params=params, **fields)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_tokens_are_those_of_transformers_on_any_shape_and_beside_others(
    pool: RankPool, tiny: Reference, shape: tuple[int, int]
) -> None:
    free = EngineRequest(
        request_id="free", prompt_ids=PROMPT, params=SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    )
    arrivals = [Arrival(free), *(Arrival(constrained(pattern, pattern), i) for i, pattern in enumerate(PATTERNS))]
    with pool.mesh(tiny.folder, *shape) as mesh:
        served = mesh.serve(arrivals)
    assert served.token_ids("free") == tiny.greedy(PROMPT, 40)
    for pattern in PATTERNS:
        expected = expected_ids(tiny, pattern, 24)
        assert tuple(served.token_ids(pattern)) == expected
        is_whole = served.outputs[pattern][-1].finish_reason is FinishReason.STOP
        assert is_whole == (expected[-1] == EOS_ID)
    assert any(expected_ids(tiny, pattern, 24)[-1] == EOS_ID for pattern in PATTERNS)
    assert served.stats.num_used_pages == 0


def test_a_preemption_changes_no_token(pool: RankPool, tiny: Reference) -> None:
    requests = [constrained(str(i), pattern) for i, pattern in enumerate(PATTERNS * 2)]
    with pool.mesh(tiny.folder, 1, 1, max_model_len=64, max_num_seqs=2) as mesh:
        page_bytes = mesh.infos[0].kv_bytes // (mesh.infos[0].num_kv_tokens // 16)
    with pool.mesh(tiny.folder, 1, 1, max_model_len=64, kv_memory_bytes=7 * page_bytes, max_num_seqs=8) as mesh:
        served = mesh.serve(requests)
    assert served.stats.num_preemptions > 0
    for request in requests:
        assert tuple(served.token_ids(request.request_id)) == expected_ids(tiny, request.params.regex or "", 24)


def test_a_mesh_goes_on_where_an_earlier_one_left_off(pool: RankPool, tiny: Reference) -> None:
    whole = {pattern: expected_ids(tiny, pattern, 24) for pattern in PATTERNS}
    resumed = [
        constrained(f"{pattern} {count}", pattern, generated_ids=whole[pattern][:count])
        for pattern in PATTERNS
        for count in range(1, len(whole[pattern]))
    ]
    with pool.mesh(tiny.folder, 1, 1) as mesh:
        served = mesh.serve(resumed)
    for request in resumed:
        assert request.generated_ids + tuple(served.token_ids(request.request_id)) == whole[request.params.regex or ""]


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_drafted_tokens_change_nothing(pool: RankPool, tiny: Reference, shape: tuple[int, int]) -> None:
    patterns = [*PATTERNS, "(abc-[0-9]{2};){4,}", "((one|two), )+"]
    params = SamplingParams(temperature=1.0, max_tokens=60, regex="(key: [a-d]{1,3}\n)+", seed=4)
    drawn = EngineRequest(request_id="drawn", prompt_ids=PROMPT, params=params)
    requests = [*(constrained(pattern, pattern, max_tokens=40) for pattern in patterns), drawn]
    with pool.mesh(tiny.folder, *shape) as mesh:
        plain = mesh.serve([drawn])
    with pool.mesh(tiny.folder, *shape, max_draft_tokens=8) as mesh:
        served = mesh.serve(requests)
    assert served.stats.num_drafted_tokens > served.stats.num_accepted_tokens > 20
    for pattern in patterns:
        assert tuple(served.token_ids(pattern)) == expected_ids(tiny, pattern, 40)
    assert served.token_ids("drawn") == plain.token_ids("drawn")


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:40])
def test_what_is_drawn_is_json_of_the_schema(llm: LLM, schema: Any) -> None:
    params = [
        SamplingParams(temperature=2.0, max_tokens=400, json_schema=schema, seed=seed, logit_bias={258: 2.0})
        for seed in range(12)
    ]
    completions = llm.generate([PROMPT] * len(params), params)
    whole = [one for one in completions if one.finish_reason == "stop"]
    assert len(whole) >= 6
    for one in whole:
        jsonschema.validate(json.loads(one.text), schema)
    alone = llm.generate(PROMPT, params[3])[0]
    assert alone.token_ids == completions[3].token_ids


@settings(max_examples=25)
@given(choices=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5, unique=True), seed=st.integers(0, 9))
def test_a_choice_is_one_of_them_whatever_it_is_written_with(llm: LLM, choices: list[str], seed: int) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=60, choices=tuple(choices), seed=seed)
    assert llm.generate(PROMPT, params)[0].text in choices


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('start: "<" inner ">"\ninner: start | /[0-9]{1,3}/', r"(<(?:(?1)|[0-9]{1,3})>)"),
        ('root ::= word ("," word)*\nword ::= [a-c]+', "[a-c]+(,[a-c]+)*"),
    ],
    ids=["lark", "gbnf"],
)
def test_grammars_are_taken_in_two_notations(llm: LLM, grammar: str, pattern: str) -> None:
    bias = {258: 5.0, **dict.fromkeys(PROMPT, 3.0)}
    for seed in range(5):
        params = SamplingParams(max_tokens=200, grammar=grammar, seed=seed, logit_bias=bias)
        text = llm.generate(PROMPT, params)[0].text
        assert regex.fullmatch(pattern, text, partial=True), text


def test_only_tokens_that_may_come_next_have_a_probability(llm: LLM) -> None:
    streams = llm.streams()
    streams.add(PROMPT, SamplingParams(max_tokens=1, choices=("ab", "bc", "cd"), logprobs=20))
    [(_, _, output)] = streams
    assert llm.tokenizer is not None
    assert sorted(llm.tokenizer.decode([token_id]) for token_id, _ in output.top_logprobs) == ["a", "b", "c"]
    assert sum(math.exp(logprob) for _, logprob in output.top_logprobs) == pytest.approx(1.0)


def test_what_becomes_too_complex_ends_with_an_error_and_others_go_on(llm: LLM) -> None:
    hopeless = SamplingParams(max_tokens=200, regex="(((a{1,100}){1,100}){1,100}){1,100}", logit_bias={EOS_ID: -100.0})
    streams = llm.streams()
    streams.add(PROMPT, hopeless)
    streams.add(PROMPT, SamplingParams(temperature=0.0, max_tokens=24, regex=PATTERNS[0]))
    ends = {number: output for number, _, output in streams if output.finish_reason is not None}
    assert ends[0].finish_reason is FinishReason.ERROR
    assert "too complex to be kept" in (ends[0].error or "")
    assert ends[1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_a_grammar_that_takes_long_to_compile_holds_up_nobody_else(
    llm: LLM, tiny: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_at_once = Constraints._compile
    came_s: dict[int, list[float]] = {0: [], 1: []}
    token_ids: list[int] = []

    def compile_slowly(self: Constraints, constraint: Constraint) -> Any:
        time.sleep(0.5)
        return compile_at_once(self, constraint)

    monkeypatch.setattr(Constraints, "_compile", compile_slowly)
    pattern = "(never|seen|before)+"
    streams = llm.streams()
    streams.add(PROMPT, SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True))
    params = SamplingParams(temperature=0.0, max_tokens=24, regex=pattern)
    began_s = time.monotonic()
    streams.add(PROMPT, params)
    for number, _, output in streams:
        came_s[number].append(time.monotonic())
        token_ids += [output.token_id] if number == 1 and output.token_id is not None else []
    assert tuple(token_ids) == expected_ids(tiny, pattern, 24)
    assert came_s[1][0] - began_s >= 0.5
    meanwhile = [time_s for time_s in came_s[0] if time_s < came_s[1][0]]
    assert len(meanwhile) > 10
    assert max(later - earlier for earlier, later in itertools.pairwise(meanwhile)) < 0.25


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = save_llama(tmp_path, vocab_size=EOS_ID + 1, eos_token_id=EOS_ID)
    with (
        LLM(folder, dtype="float32", num_threads=1) as llm,
        pytest.raises(FieldError, match="regex: needs the tokenizer"),
    ):
        llm.generate(PROMPT, SamplingParams(regex="a"))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"regex": "a", "choices": ("b",)}, "choices"),
        ({"json_schema": ""}, "json_schema"),
        ({"json_schema": {"enum": {1, 2}}}, "json_schema"),
        ({"choices": ("a", "")}, "choices"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"grammar": "start: /a/", "min_tokens": 2}, "min_tokens"),
        ({"json_schema": {}, "num_beams": 2}, "json_schema"),
    ],
)
def test_what_leaves_no_place_for_a_constraint_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        SamplingParams(**fields)
    assert caught.value.field == field


def test_what_cannot_be_kept_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(FieldError, match="json_schema: Invalid type: objekt"):
        llm.generate(PROMPT, SamplingParams(json_schema={"type": "objekt"}))


def test_parameters_come_out_of_messages_as_they_went_in() -> None:
    for given_ in ({"json_schema": {"type": "null"}}, {"json_schema": "{}"}, {"choices": ("a", "b")}, {"regex": "x"}):
        params = SamplingParams(**given_)  # type: ignore[arg-type]
        again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
        assert again == params
        assert again.constraint == params.constraint is not None


@pytest.mark.parametrize("name", ["smollm2", "sentencepiece"])
def test_texts_are_read_by_the_tokens_that_write_them(name: str, tmp_path: Path) -> None:
    source = "smollm2-135m" if name == "smollm2" else str(write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    folder = resolve_model(source, cache_dir=None if name == "smollm2" else tmp_path)
    tokenizer = Tokenizer.load(folder)
    text = json.dumps(
        {"name": "Ada é 日本 😀", "born": [1815, 12.5e3, None], "x y": {"": "\n\t\\"}}, ensure_ascii=False
    )
    ids = tokenizer.encode(f"a{text}", add_special_tokens=False)
    ids = ids[next(i for i in range(len(ids)) if tokenizer.decode(ids[i:]).strip() == text) :]
    constraints = Constraints(folder, tokenizer.vocab_size + 7, (2,), torch.device("cpu"), lambda ready: None)
    params = SamplingParams(json_schema={"type": "object"})
    assert params.constraint is not None
    constraints.start(1, params.constraint, ())
    for count in range(len(ids) + 1):
        constraints.start(0, params.constraint, ids[:count])
        while NOT_YET in (found := constraints.barred([0, 1], {}))[1].values():
            pass
        (barred, in_steps), instead = found
        constraints.drawn({1: 0}, torch.tensor(ids[count : count + 1]), {})
        assert instead == {}
        assert barred.shape == (tokenizer.vocab_size + 7,)
        assert (barred == in_steps).all()
        assert not barred[(*ids, 2)[count]], (tokenizer.decode(ids[:count]), tokenizer.decode(ids[count:]))
        assert barred[tokenizer.vocab_size :].all()
    assert (~barred).sum() == 1
