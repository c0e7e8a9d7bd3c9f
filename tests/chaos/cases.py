"""The requests of a chaos run: a mixed handful, drawn from the seed, each asked many times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from shardray.runtime.client import AsyncClient, Prompt, SamplingOptions

_WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "sea",
    "ship",
    "wind",
    "captain",
    "found",
    "old",
    "letter",
    "under",
    "stone",
    "bridge",
    "river",
    "city",
    "night",
    "morning",
    "light",
    "why",
    "how",
    "count",
    "seven",
    "numbers",
    "3",
    "12",
    "450",
    "def",
    "return",
    "list",
    "print",
    "hello,",
    "world.",
    "Then:",
    "they",
    "said",
    '"no"',
    "(yes!)",
    "étoile",
    "東京",
]
_CONSTRAINTS: list[dict[str, object]] = [
    {"json_schema": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 9}},
    {"regex": "([a-z]{2,9} [0-9]{1,4}[,.] ){30,}"},
    {"grammar": 'start: "(" start ")" start | /[a-z]+/ start | "."'},
]
_MAX_PROMPT_TOKENS = 400
_MIN_TOKENS, _MAX_TOKENS = 8, 200


@dataclass(frozen=True, eq=False)
class Case:
    """One request that can be asked any number of times, with the same answer each time."""

    name: str
    prompt: Prompt
    options: SamplingOptions


async def draw_cases(rng: Random, client: AsyncClient, num_cases: int) -> list[Case]:
    """As many cases of each kind as of any other, give or take one; prompts of 1 to 400 tokens."""
    kinds = [_greedy, _sampled, _narrowed, _with_logprobs, _constrained, _chat, _text]
    return [await kinds[number % len(kinds)](rng, client, number) for number in range(num_cases)]


def with_stop(case: Case, text: str, rng: Random) -> Case:
    """The case ended early by a stop string out of ``text``, which it answers."""
    start = rng.randrange(len(text) // 2, max(len(text) - 3, len(text) // 2 + 1))
    return Case(f"{case.name}-stop", case.prompt, {**case.options, "stop": ["never in it", text[start : start + 3]]})


async def _greedy(rng: Random, client: AsyncClient, number: int) -> Case:
    return Case(f"{number}-greedy", await _token_ids(rng, client), _options(rng, temperature=0.0))


async def _sampled(rng: Random, client: AsyncClient, number: int) -> Case:
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    options = _options(rng, temperature=0.8, top_p=0.9, seed=rng.getrandbits(64), **penalties)
    return Case(f"{number}-sampled", await _token_ids(rng, client), options)


async def _narrowed(rng: Random, client: AsyncClient, number: int) -> Case:
    options = _options(rng, temperature=1.1, top_k=30, min_p=0.02, min_tokens=5, seed=rng.getrandbits(64))
    return Case(f"{number}-narrowed", await _token_ids(rng, client), options)


async def _with_logprobs(rng: Random, client: AsyncClient, number: int) -> Case:
    temperature = rng.choice([0.0, 0.7])
    options = _options(rng, temperature=temperature, seed=rng.getrandbits(64), logprobs=5)
    return Case(f"{number}-logprobs", await _token_ids(rng, client), options)


async def _constrained(rng: Random, client: AsyncClient, number: int) -> Case:
    options = (
        _options(rng, temperature=0.9, seed=rng.getrandbits(64)) | rng.choice(_CONSTRAINTS) | {"ignore_eos": False}
    )
    return Case(f"{number}-constrained", await _token_ids(rng, client), options)  # type: ignore[arg-type]


async def _chat(rng: Random, client: AsyncClient, number: int) -> Case:
    messages = [{"role": "user", "content": _text_of(rng, rng.randint(1, 30))}]
    return Case(f"{number}-chat", messages, _options(rng, temperature=0.6, seed=rng.getrandbits(64)))


async def _text(rng: Random, client: AsyncClient, number: int) -> Case:
    return Case(f"{number}-text", _text_of(rng, rng.randint(1, 20)), _options(rng, temperature=0.0))


def _options(rng: Random, **options: object) -> SamplingOptions:
    common: SamplingOptions = {"max_tokens": rng.randint(_MIN_TOKENS, _MAX_TOKENS), "ignore_eos": rng.random() < 0.8}
    if rng.random() < 0.5:
        common["logprobs"] = rng.randrange(5)
    return {**common, **options}  # type: ignore[typeddict-item]


async def _token_ids(rng: Random, client: AsyncClient) -> Sequence[int]:
    """The first 1 to 400 tokens of some text; every third prompt is a short one."""
    length = rng.randint(1, 8) if rng.random() < 0.33 else rng.randint(1, _MAX_PROMPT_TOKENS)
    return (await client.tokenize(_text_of(rng, length)))[:length]


def _text_of(rng: Random, num_words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(num_words))
