"""Text as tokens come: whole characters only, the same however the tokens are grouped, and no stop string leaked."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.runtime.model.detokenizer import Detokenizer, StopStrings
from shardray.runtime.model.tokenizer import Tokenizer

TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(["👩‍👩‍👧‍👦", "🇫🇷", "é", "漢字", "नमस्ते", " hello", "▁", "  ", "\n", "\u200d", "Paris", "12"])
).map("".join)


@pytest.fixture(scope="module", params=["smollm2_tokenizer", "sentencepiece_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Tokenizer)
    return found


def chunks(draw: st.DrawFn | st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = draw.draw(st.lists(st.integers(0, len(ids)), max_size=8).map(sorted))  # type: ignore[union-attr]
    return [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@settings(max_examples=150)
@given(text=TEXTS, data=st.data())
def test_the_pieces_add_up_to_the_whole_and_none_holds_half_a_character(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(chunk) for chunk in chunks(data, ids)]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + detokenizer.finish() == whole
    if "\ufffd" not in whole:  # SmolLM2 has no token for some bytes, so it cannot spell every character
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100)
@given(text=TEXTS, data=st.data())
def test_after_a_prompt_the_text_is_what_the_answer_adds_to_it(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    if "\ufffd" in before:  # a prompt that ends inside a character is not decodable by itself
        return
    detokenizer = Detokenizer(tokenizer, prompt_tail_ids=ids[:cut])
    assert before + "".join(detokenizer.push([token_id]) for token_id in ids[cut:]) + detokenizer.finish() == whole


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_random_byte_level_ids_decode_as_a_whole_would(smollm2_tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(smollm2_tokenizer)
    text = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.finish()
    assert text == smollm2_tokenizer.decode(ids)


def test_an_emoji_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦀", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push([token_id]) for token_id in ids[:-1]) == ""
    assert detokenizer.push(ids[-1:]) == "🦀"


def test_a_character_begun_in_the_prompt_is_completed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦀", add_special_tokens=False)
    assert Detokenizer(tokenizer, prompt_tail_ids=ids[:-1]).push(ids[-1:]) == "🦀"


def test_a_character_never_completed_shows_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦀", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_special_and_unknown_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    end_id = min(tokenizer.special_token_ids)
    ids = [*tokenizer.encode("hello", add_special_tokens=False), end_id, end_id + 10**6]
    assert Detokenizer(tokenizer).push(ids) == "hello"


def test_a_leading_space_is_dropped_at_the_start_of_a_text_only(sentencepiece_tokenizer: Tokenizer) -> None:
    hello, world = sentencepiece_tokenizer.encode("hello world", add_special_tokens=False)
    assert Detokenizer(sentencepiece_tokenizer).push([1, hello, world]) == "hello world"
    assert Detokenizer(sentencepiece_tokenizer, prompt_tail_ids=[1]).push([hello]) == "hello"
    assert Detokenizer(sentencepiece_tokenizer, prompt_tail_ids=[1, hello]).push([world]) == " world"


def test_invalid_bytes_without_end_are_yielded_as_they_come(smollm2_tokenizer: Tokenizer) -> None:
    continuation = next(i for i in range(49152) if smollm2_tokenizer.piece(i) == b"\x80")
    detokenizer = Detokenizer(smollm2_tokenizer)
    start_s = time.perf_counter()
    assert all(detokenizer.push([continuation]) == "\ufffd" for _ in range(50_000))
    assert time.perf_counter() - start_s < 5  # linear: quadratic work would take minutes


def run_stops(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    sent = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        sent += text
        if matched:
            return sent, True
    return sent + matcher.finish(), False


@settings(max_examples=300)
@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple),
    data=st.data(),
)
def test_stops_are_found_across_borders_and_cut_where_the_first_is_complete(
    text: str, stops: tuple[str, ...], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(stops)]
    sent, matched = run_stops(stops, pieces)
    assert matched == bool(ends)
    if not ends:
        assert sent == text
        return
    longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
    assert sent == text[: ends[0] - longest]


def test_only_what_could_become_a_stop_is_held_back() -> None:
    matcher = StopStrings(("\n\nUser:", "###"))
    assert matcher.push("Hello.\n") == ("Hello.", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("ual #") == ("\n\nUsual ", False)
    assert matcher.push("##never sent") == ("", True)
    assert matcher.push("nor this") == ("", True)
    assert matcher.finish() == ""


def test_what_is_held_is_sent_when_the_stream_ends_otherwise() -> None:
    matcher = StopStrings(("END",))
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.finish() == "EN"


def test_without_stops_everything_passes() -> None:
    assert run_stops((), ["a", "b"]) == ("ab", False)
