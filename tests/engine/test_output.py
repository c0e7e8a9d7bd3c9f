"""From the tokens of a request to the text that its reader sees, with a real tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.runtime.engine.output import Delta, OutputText
from shardray.runtime.engine.request import FieldError, FinishReason, SamplingParams, TokenOutput
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("ab stop\n.éß漢字🙂🏽👩‍👩‍👧"), max_size=30)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def stream(output: OutputText, ids: list[int], reason: FinishReason | None = FinishReason.LENGTH) -> list[Delta]:
    """Push ``ids`` one by one, the last with ``reason``."""
    ends = [None] * (len(ids) - 1) + [reason]
    return [output.push(TokenOutput("r", i, finish_reason=end)) for i, end in zip(ids, ends, strict=True)]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@settings(max_examples=60)
@given(TEXTS.filter(bool))
def test_the_deltas_add_up_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    deltas = stream(OutputText(tokenizer, SamplingParams(), (1, 2)), ids)
    assert text_of(deltas) == text
    assert [i for delta in deltas for i in delta.token_ids] == ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(ids) - 1) + [FinishReason.LENGTH]


def test_a_character_is_shown_once_it_is_whole(tokenizer):
    ids = tokenizer.encode("🏽")
    assert len(ids) > 1
    deltas = stream(OutputText(tokenizer, SamplingParams(), ()), ids, None)
    assert [delta.text for delta in deltas] == [""] * (len(ids) - 1) + ["🏽"]


def test_half_a_character_at_the_end_becomes_a_replacement_character(tokenizer):
    ids = tokenizer.encode("🏽")
    assert text_of(stream(OutputText(tokenizer, SamplingParams(), ()), ids[:1])) == "\N{REPLACEMENT CHARACTER}"


def test_a_character_that_the_prompt_began_is_completed(tokenizer):
    ids = tokenizer.encode("ok 🏽")
    deltas = stream(OutputText(tokenizer, SamplingParams(), tuple(ids[:-1])), ids[-1:])
    assert text_of(deltas) == "🏽"


def test_the_end_of_sequence_token_is_counted_but_not_shown(tokenizer):
    (eos,) = tokenizer.encode("<|im_end|>")
    ids = tokenizer.encode("Hello there")
    deltas = stream(OutputText(tokenizer, SamplingParams(), (1,)), [*ids, eos], FinishReason.STOP)
    assert text_of(deltas) == "Hello there"
    assert deltas[-1] == Delta("", (eos,), FinishReason.STOP, stopped=False)


def test_a_stop_id_that_is_an_ordinary_word_is_not_shown(tokenizer):
    ids = tokenizer.encode("one two three")
    deltas = stream(OutputText(tokenizer, SamplingParams(stop_token_ids=(ids[-1],)), (1,)), ids, FinishReason.STOP)
    assert text_of(deltas) == "one two"


@settings(max_examples=100)
@given(TEXTS.filter(bool), st.lists(st.text(st.sampled_from("ab stop\n漢🙂"), min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_is_complete_first(tokenizer, text, stops):
    output = OutputText(tokenizer, SamplingParams(stop=tuple(stops)), (1,))
    deltas = stream(output, tokenizer.encode(text))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert text_of(deltas) == (text[: min(ends)[1]] if ends else text)
    last = next(delta for delta in deltas if delta.finish_reason is not None)
    assert last.stopped == bool(ends)
    assert last.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
    assert output.ended


def test_a_stop_string_across_tokens_is_never_leaked_and_later_tokens_are_dropped(tokenizer):
    ids = tokenizer.encode("The answer is 42.\n\nUser: next")
    output = OutputText(tokenizer, SamplingParams(stop=(".\n\nUser",)), (1,))
    deltas = stream(output, ids, None)
    assert text_of(deltas) == "The answer is 42"
    end = next(i for i, delta in enumerate(deltas) if delta.stopped)
    assert all(delta == Delta() for delta in deltas[end + 1 :])
    assert output.push(TokenOutput("r", finish_reason=FinishReason.ABORTED)) == Delta()


def test_text_held_back_for_a_stop_string_is_given_at_the_end(tokenizer):
    deltas = stream(OutputText(tokenizer, SamplingParams(stop=("word!",)), (1,)), tokenizer.encode("a word"), None)
    assert text_of(deltas) == "a "
    output = OutputText(tokenizer, SamplingParams(stop=("word!",)), (1,))
    assert text_of(stream(output, tokenizer.encode("a word"))) == "a word"


def test_an_end_without_a_token_flushes_what_was_held_back(tokenizer):
    output = OutputText(tokenizer, SamplingParams(stop=("word!",)), (1,))
    stream(output, tokenizer.encode("a word"), None)
    end = output.push(TokenOutput("r", finish_reason=FinishReason.ABORTED))
    assert end == Delta("word", (), FinishReason.ABORTED, stopped=False)


def test_no_stop_string_ends_a_request_before_min_tokens(tokenizer):
    ids = tokenizer.encode("a b c a b c")
    params = SamplingParams(stop=(" b",), min_tokens=4)
    assert text_of(stream(OutputText(tokenizer, params, (1,)), ids)) == "a b c a"


def test_without_a_tokenizer_there_are_token_ids_only():
    deltas = stream(OutputText(None, SamplingParams(), (1,)), [5, 6])
    assert deltas == [Delta("", (5,)), Delta("", (6,), FinishReason.LENGTH)]


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(FieldError, match="stop: the model folder has no tokenizer"):
        OutputText(None, SamplingParams(stop=("x",)), (1,))
