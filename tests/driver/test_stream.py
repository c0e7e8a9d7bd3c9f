"""Tokens become text at the client's own pace, without half characters and without stop strings."""

from __future__ import annotations

import pytest

from shardray.runtime.driver.deltas import Delta
from shardray.runtime.driver.errors import UnavailableError
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.stream import RequestStream
from shardray.runtime.engine.request import FinishReason, SamplingParams, TokenOutput
from shardray.runtime.model.tokenizer import Tokenizer
from tests.stub_tokenizer import EOS_ID

pytestmark = pytest.mark.asyncio


def make_stream(tokenizer: Tokenizer | None, params: SamplingParams | None = None) -> RequestStream:
    entry = JournalEntry("a", (1, 2, 3), params or SamplingParams())
    return RequestStream(entry, tokenizer)


def push_text(stream: RequestStream, tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode(text):
        stream.push(TokenOutput("a", token_id))


async def read_all(stream: RequestStream) -> list[Delta]:
    return [delta async for delta in stream]


async def test_tokens_that_were_not_read_are_merged_into_one_delta(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer)
    push_text(stream, tokenizer, "hello")
    stream.finish(FinishReason.LENGTH)
    [delta] = await read_all(stream)
    assert delta.text == "hello"
    assert delta.token_ids == tokenizer.encode("hello")
    assert delta.finish_reason is FinishReason.LENGTH
    assert delta.usage is not None
    assert (delta.usage.num_prompt_tokens, delta.usage.num_output_tokens) == (3, 5)


async def test_a_reader_that_keeps_up_gets_each_token_and_never_half_a_character(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer)
    reader = aiter(stream)
    texts = []
    for token_id in tokenizer.encode("né"):
        stream.push(TokenOutput("a", token_id))
        texts.append((await anext(reader)).text)
    assert texts == ["n", "", "é"]


async def test_a_character_that_is_never_completed_comes_as_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer)
    stream.push(TokenOutput("a", tokenizer.encode("é")[0], finish_reason=FinishReason.LENGTH))
    [delta] = await read_all(stream)
    assert delta.text == "\N{REPLACEMENT CHARACTER}"


async def test_a_stop_string_across_tokens_ends_the_text_and_is_never_sent(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer, SamplingParams(stop=("END",)))
    push_text(stream, tokenizer, "ab EN")
    assert not stream.ended
    push_text(stream, tokenizer, "D and more")
    assert stream.ended
    [delta] = await read_all(stream)
    assert delta.text == "ab "
    assert delta.finish_reason is FinishReason.STOP
    assert delta.token_ids == tokenizer.encode("ab END")


async def test_text_held_back_for_a_stop_string_is_sent_when_the_stream_ends_otherwise(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer, SamplingParams(stop=("END",)))
    push_text(stream, tokenizer, "ab EN")
    stream.finish(FinishReason.LENGTH)
    [delta] = await read_all(stream)
    assert delta.text == "ab EN"


async def test_no_stop_string_ends_the_text_before_min_tokens(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer, SamplingParams(stop=("x",), min_tokens=3))
    push_text(stream, tokenizer, "xx")
    assert not stream.ended
    push_text(stream, tokenizer, "x")
    assert stream.ended


async def test_the_id_that_stopped_the_model_is_a_token_but_not_text(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer, SamplingParams(stop_token_ids=(tokenizer.encode("!")[0],)))
    push_text(stream, tokenizer, "a")
    stream.push(TokenOutput("a", tokenizer.encode("!")[0], finish_reason=FinishReason.STOP))
    [delta] = await read_all(stream)
    assert delta.text == "a"
    assert delta.token_ids == tokenizer.encode("a!")


async def test_special_tokens_are_no_text_when_generation_goes_on_behind_them(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer, SamplingParams(ignore_eos=True))
    stream.push(TokenOutput("a", EOS_ID))
    push_text(stream, tokenizer, "b")
    stream.finish(FinishReason.LENGTH)
    assert [delta.text for delta in await read_all(stream)] == ["b"]


async def test_an_error_comes_after_the_text_that_preceded_it(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer)
    push_text(stream, tokenizer, "ab")
    reader = aiter(stream)
    assert (await anext(reader)).text == "ab"
    push_text(stream, tokenizer, "c")
    stream.fail(UnavailableError("the replica is gone", 1.0))
    assert (await anext(reader)).text == "c"
    with pytest.raises(UnavailableError, match="gone"):
        await anext(reader)


async def test_a_model_without_a_tokenizer_streams_token_ids() -> None:
    stream = make_stream(None)
    stream.push(TokenOutput("a", 7, finish_reason=FinishReason.LENGTH))
    [delta] = await read_all(stream)
    assert (delta.text, delta.token_ids) == ("", [7])


async def test_log_probabilities_are_cut_to_what_was_asked_for(tokenizer: Tokenizer) -> None:
    stream = make_stream(tokenizer, SamplingParams(logprobs=1))
    stream.push(TokenOutput("a", 5, -0.5, ((5, -0.5), (6, -1.5)), FinishReason.LENGTH))
    [delta] = await read_all(stream)
    assert [(entry.token_id, entry.logprob, entry.top) for entry in delta.logprobs] == [(5, -0.5, ((5, -0.5),))]


async def test_what_merged_while_nobody_read_comes_in_pieces_that_fit_into_messages() -> None:
    stream = make_stream(None, SamplingParams(logprobs=0, max_tokens=5000))
    for number in range(3000):
        stream.push(TokenOutput("a", number, -0.5))
    stream.finish(FinishReason.LENGTH)
    deltas = await read_all(stream)
    assert [len(delta.token_ids) for delta in deltas] == [1024, 1024, 952]
    assert [token_id for delta in deltas for token_id in delta.token_ids] == list(range(3000))
    assert [entry.token_id for delta in deltas for entry in delta.logprobs] == list(range(3000))
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH]
