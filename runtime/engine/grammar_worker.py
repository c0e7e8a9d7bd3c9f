"""Constraints in llguidance's notation; and whether it can keep them, asked in a sandbox (see ``sandbox_main.py``)."""

from __future__ import annotations

import functools
import json

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

# Between two tokens of JSON: room to indent, none to go on with blanks for ever, as small models do.
_BLANKS = r"[ \t\r\n]{0,32}"
_MAX_ERROR_LEN = 500  # which may quote all of it


def to_grammar(kind: str, text: str) -> str:
    """See ``Constraint``. Raises ValueError."""
    match kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _BLANKS})
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "choices":
            return LLMatcher.grammar_from_regex("|".join(map(_escape, json.loads(text))))
    return grammar_from("gbnf" if "::=" in text else "lark", text)


def _escape(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)


@functools.cache
def limits() -> LLParserLimits:
    """What is allowed next takes up to some 10 ms to tell, and a request up to some 20 MB."""
    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        verbose_errors=False,  # they have the text
    )


def answer(question: dict[str, str]) -> dict[str, str]:
    """To {"kind", "text"}: nothing, or what is wrong with it."""
    try:
        grammar = to_grammar(question["kind"], question["text"])
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return {"text": ""}
    fault = matcher.get_error()
    return {"error": "no text fits it" if fault.startswith("NoExtension") else fault[:_MAX_ERROR_LEN]}


@functools.cache
def _bytes() -> LLTokenizer:
    """A vocabulary in which a token is a byte."""
    return LLTokenizer("byte")
