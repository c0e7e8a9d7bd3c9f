"""``shardray generate``: one completion, streamed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from shardray.runtime.cli import options

if TYPE_CHECKING:
    from shardray.runtime.client import Delta


def command(
    text: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the text as a user's message through the chat template.")
    ] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the most likely one.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Less of every token in the output.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Less of a token for each occurrence.")] = None,
    seed: options.Seed = None,
    min_tokens: Annotated[int | None, typer.Option(help="Do not end before this many tokens.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="With --json: the log-probabilities of the top n.")] = None,
    forced: Annotated[
        list[int] | None, typer.Option(help="Token id that the output begins with; may be given several times.")
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(help="Above 1: follow so many texts and print the most likely, at its end.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="With --num-beams: above 1 for longer texts, below for shorter ones.")
    ] = None,
    early_stopping: Annotated[
        bool, typer.Option("--early-stopping", help="With --num-beams: end once so many texts have ended.")
    ] = False,
    json_schema: Annotated[
        str | None, typer.Option(help="The text is JSON that fits this schema; @FILE reads it from a file.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The whole text matches this regular expression.")] = None,
    grammar: Annotated[
        str | None, typer.Option(help="The text is of this grammar (Lark or GBNF); @FILE reads it from a file.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The text is this one, or another choice; may be given several times.")
    ] = None,
    timeout_s: options.Timeout = None,
) -> None:
    """Stream one completion.

    With --json, one object a line: text, token ids, log-probabilities; usage and timing in the last.
    """
    from shardray.runtime.client import Client

    prompt = options.text_or_stdin(text)
    show = _print_json if as_json else _print_text
    with Client(server) as client:
        deltas = client.stream(
            [{"role": "user", "content": prompt}] if chat else prompt,
            timeout_s=timeout_s,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop=stop,
            logprobs=logprobs,
            forced=forced,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            json_schema=options.text_or_file("--json-schema", json_schema),
            regex=regex,
            grammar=options.text_or_file("--grammar", grammar),
            choices=choice,
        )
        for delta in deltas:
            show(delta)


def _print_text(delta: Delta) -> None:
    sys.stdout.write(delta.text)
    if delta.finish_reason is not None:
        sys.stdout.write("\n")
    sys.stdout.flush()


def _print_json(delta: Delta) -> None:
    from shardray.runtime.cli.json_messages import to_jsonable

    fields = {
        "request_id": delta.request_id,
        "text": delta.text,
        "token_ids": delta.token_ids,
        "logprobs": [to_jsonable(position) for position in delta.logprobs] or None,
        "finish_reason": delta.finish_reason,
        "usage": delta.usage and to_jsonable(delta.usage),
        "timing": delta.timing and to_jsonable(delta.timing),
        "seed": delta.seed,
    }
    print(json.dumps({key: value for key, value in fields.items() if value is not None}), flush=True)
