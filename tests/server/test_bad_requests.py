"""What a client writes wrong is refused with the field's name, and never reaches an engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.engine.request import FieldError, ServedModel
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.checks import CheckedRequest, check_generate
from shardray.v1 import common_pb2, inference_pb2

pytestmark = pytest.mark.asyncio
MODEL = ServedModel(vocab_size=300, max_model_len=100, eos_token_ids=(258,), num_kv_tokens=1000)

# Each rule of it is another one's only part.
CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'


def ids(*token_ids: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(token_ids=common_pb2.TokenIds(ids=token_ids))


def sampling(**fields: object) -> inference_pb2.GenerateRequest:
    request = ids(1, 2, 3)
    request.sampling.CopyFrom(common_pb2.SamplingParameters(**fields))  # type: ignore[arg-type]
    return request


def chat(*messages: tuple[str, str]) -> inference_pb2.GenerateRequest:
    turns = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return inference_pb2.GenerateRequest(chat=inference_pb2.ChatMessages(messages=turns))


async def check(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer | None, model: ServedModel = MODEL
) -> CheckedRequest:
    return await check_generate(request, tokenizer, model, default_seed=7)


BAD: list[tuple[str, inference_pb2.GenerateRequest, str]] = [
    ("prompt", inference_pb2.GenerateRequest(), "missing"),
    ("text", inference_pb2.GenerateRequest(text=""), "empty"),
    ("token_ids", ids(), "empty"),
    ("token_ids.ids", ids(1, 300), r"300 .*\[0, 300\)"),
    ("token_ids", ids(*[1] * 100), "100 tokens, but the context window is 100; shorten it by at least 1"),
    ("chat.messages", chat(), "empty"),
    ("chat.messages[1].role", chat(("user", "x"), ("", "y")), "empty"),
    ("request_id", inference_pb2.GenerateRequest(text="a", request_id="x" * 129), "128"),
    ("request_id", inference_pb2.GenerateRequest(text="a", request_id="é"), "ASCII"),
    ("priority", inference_pb2.GenerateRequest(text="a", priority=101), "-100, 100"),
    ("sampling.temperature", sampling(temperature=-0.1), "-0.1"),
    ("sampling.temperature", sampling(temperature=math.nan), "nan"),
    ("sampling.temperature", sampling(temperature=math.inf), "inf"),
    ("sampling.top_p", sampling(top_p=0), "0.0"),
    ("sampling.top_p", sampling(top_p=1.5), "1.5"),
    ("sampling.min_p", sampling(min_p=math.nan), "nan"),
    ("sampling.top_k", sampling(top_k=2**31), "2147483648"),
    ("sampling.repetition_penalty", sampling(repetition_penalty=0), "0.0"),
    ("sampling.presence_penalty", sampling(presence_penalty=-101), "-101"),
    ("sampling.frequency_penalty", sampling(frequency_penalty=math.nan), "nan"),
    ("sampling.max_tokens", sampling(max_tokens=0), "0 "),
    ("sampling.max_tokens", sampling(max_tokens=98), "3 tokens and max_tokens is 98, .*at most 97"),
    ("sampling.min_tokens", sampling(max_tokens=5, min_tokens=6), "6 "),
    ("sampling.min_tokens", sampling(min_tokens=98), "97"),
    ("sampling.logprobs", sampling(logprobs=21), "21"),
    ("sampling.stop[1]", sampling(stop=["a", ""]), "0 characters"),
    ("sampling.stop[0]", sampling(stop=["a" * 257]), "257"),
    ("sampling.stop", sampling(stop=["a"] * 17), "17"),
    ("sampling.stop_token_ids", sampling(stop_token_ids=[300]), "300"),
    ("sampling.stop_token_ids", sampling(stop_token_ids=[1] * 129), "129"),
    ("sampling.num_beams", sampling(num_beams=0), r"0 is outside \[1, 16\]"),
    ("sampling.num_beams", sampling(num_beams=17), "17 exceeds the 16 of engine.max_num_seqs"),
    ("sampling.length_penalty", sampling(num_beams=2, length_penalty=math.nan), "nan"),
    ("sampling.length_penalty", sampling(num_beams=2, length_penalty=10.5), "10.5"),
    ("sampling.length_penalty", sampling(length_penalty=2.0), "set num_beams above 1 with it"),
    ("sampling.early_stopping", sampling(early_stopping=True), "set num_beams above 1 with it"),
    ("sampling.temperature", sampling(num_beams=2, temperature=0.7), "leave it unset with num_beams"),
    ("sampling.top_k", sampling(num_beams=2, top_k=4), "leave it unset with num_beams"),
    ("sampling.top_p", sampling(num_beams=2, top_p=0.9), "leave it unset with num_beams"),
    ("sampling.min_p", sampling(num_beams=2, min_p=0.1), "leave it unset with num_beams"),
    ("sampling.logprobs", sampling(num_beams=2, logprobs=0), "leave it unset with num_beams"),
    ("sampling.stop", sampling(num_beams=2, stop=["a"]), "stop_token_ids can be set"),
    ("sampling.json_schema", sampling(json_schema=""), "is empty"),
    ("sampling.json_schema", sampling(json_schema="{"), "EOF while parsing"),
    ("sampling.json_schema", sampling(json_schema='{"type": "objekt"}'), "Invalid type: objekt"),
    ("sampling.json_schema", sampling(json_schema='{"not": {}}'), "Unimplemented keys"),
    ("sampling.json_schema", sampling(json_schema='{"$ref": "#"}'), "no text fits it"),
    ("sampling.json_schema", sampling(json_schema='{"$ref": "http://127.0.0.1:1/x"}'), "127.0.0.1:1/x"),
    ("sampling.json_schema", sampling(json_schema="1" * 65_537), "65537 characters, at most 65536"),
    ("sampling.regex", sampling(regex="(a|b"), "unclosed group"),
    ("sampling.regex", sampling(regex="(?=a)b"), "look-around"),
    ("sampling.regex", sampling(regex="(" * 60_000), "invalid regex"),
    ("sampling.grammar", sampling(grammar='begin: "a"'), "start"),
    ("sampling.grammar", sampling(grammar="start: " + "(" * 60_000), "nested"),
    ("sampling.grammar", sampling(grammar=CHAIN), "nested too deeply"),
    ("sampling.choices", sampling(choices=["a", ""]), "a choice may not be empty"),
    ("sampling.choices", sampling(choices=["a"] * 1025), "1025 entries, at most 1024"),
    ("sampling.choices", sampling(choices=["a" * 1000] * 66), "66000 characters"),
    ("sampling.regex", sampling(json_schema="{}", regex="a"), "cannot stand beside json_schema"),
    ("sampling.min_tokens", sampling(regex="a", min_tokens=1), "regex says where the text ends"),
    ("sampling.ignore_eos", sampling(regex="a", ignore_eos=True), "regex says where the text ends"),
    ("sampling.regex", sampling(regex="a", num_beams=2), "leave it unset with num_beams"),
    ("sampling.logit_bias", sampling(logit_bias={300: 1.0}), "300"),
    ("sampling.logit_bias[5]", sampling(logit_bias={5: math.nan}), "nan"),
]


@pytest.mark.parametrize(("field", "request_", "message"), BAD, ids=[f"{f}-{i}" for i, (f, _, _) in enumerate(BAD)])
async def test_a_bad_field_is_named_with_its_value(
    field: str, request_: inference_pb2.GenerateRequest, message: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        await check(request_, tokenizer)
    assert caught.value.field == field


async def test_a_prompt_longer_than_the_cache_is_refused_with_the_caches_size(tokenizer: Tokenizer) -> None:
    small = ServedModel(vocab_size=300, max_model_len=100, eos_token_ids=(), num_kv_tokens=32)
    with pytest.raises(FieldError, match="KV cache holds 32 tokens"):
        await check(ids(*[1] * 40), tokenizer, small)
    assert (await check(ids(*[1] * 30), tokenizer, small)).params.max_tokens == 2


@pytest.mark.parametrize("field", ["text", "chat", "sampling.stop"])
async def test_a_model_without_a_tokenizer_takes_token_ids_only(field: str) -> None:
    requests: dict[str, Callable[[], inference_pb2.GenerateRequest]] = {
        "text": lambda: inference_pb2.GenerateRequest(text="a"),
        "chat": lambda: chat(("user", "a")),
        "sampling.stop": lambda: sampling(stop=["a"]),
    }
    with pytest.raises(FieldError, match="no tokenizer") as caught:
        await check(requests[field](), None)
    assert caught.value.field == field
    assert (await check(ids(1, 2), None)).prompt_ids == (1, 2)


async def test_what_is_left_out_gets_its_default(tokenizer: Tokenizer) -> None:
    checked = await check(ids(1, 2, 3), tokenizer)
    assert checked.params.seed == 7
    assert checked.params.max_tokens == 97, "what the context window leaves"
    assert checked.params.temperature == 1.0
    assert checked.request_id
    roomy = ServedModel(vocab_size=300, max_model_len=1000, eos_token_ids=(), num_kv_tokens=1000)
    assert (await check(ids(1), tokenizer, roomy)).params.max_tokens == 256
    request = ids(1)
    request.sampling.min_tokens = 300
    assert (await check(request, tokenizer, roomy)).params.max_tokens == 300


async def test_a_long_text_is_tokenized_as_a_short_one_is(tokenizer: Tokenizer) -> None:
    roomy = ServedModel(vocab_size=300, max_model_len=100_000, eos_token_ids=(), num_kv_tokens=100_000)
    text = "word " * 5000
    request = inference_pb2.GenerateRequest(text=text)
    assert list((await check(request, tokenizer, roomy)).prompt_ids) == tokenizer.encode(text)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(),
        "top_p": st.floats(),
        "min_p": st.floats(),
        "repetition_penalty": st.floats(),
        "presence_penalty": st.floats(),
        "frequency_penalty": st.floats(),
        "top_k": st.integers(0, 2**32 - 1),
        "max_tokens": st.integers(0, 2**32 - 1),
        "min_tokens": st.integers(0, 2**32 - 1),
        "logprobs": st.integers(0, 2**32 - 1),
        "stop_token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=3),
        "logit_bias": st.dictionaries(st.integers(0, 2**32 - 1), st.floats(), max_size=3),
        "stop": st.lists(st.text(max_size=3), max_size=3),
        "num_beams": st.integers(0, 20),
        "length_penalty": st.floats(),
        "early_stopping": st.booleans(),
        "json_schema": st.sampled_from(["", "{}", "[", '{"type": "integer"}', '{"enum": []}']),
        "regex": st.text(max_size=6),
        "grammar": st.text(max_size=6).map("start: {}".format),
        "choices": st.lists(st.text(max_size=3), max_size=3),
    },
)


@given(fields=FIELDS, prompt=st.lists(st.integers(0, 400), max_size=120))
async def test_whatever_is_sent_is_either_refused_by_name_or_can_run(
    fields: dict[str, object], prompt: list[int], tokenizer: Tokenizer
) -> None:
    request = ids(*prompt)
    request.sampling.CopyFrom(common_pb2.SamplingParameters(**fields))  # type: ignore[arg-type]
    field = None
    try:
        checked = await check(request, tokenizer)
    except FieldError as error:
        field = error.field.split(".")[0]
    if field is None:
        assert 0 < len(checked.prompt_ids) + checked.params.max_tokens <= MODEL.max_model_len
    else:
        assert field in ("token_ids", "sampling")
