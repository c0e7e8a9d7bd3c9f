"""docs/troubleshooting.md explains the messages that there are, and no others."""

from __future__ import annotations

import ast

from tests.operator_messages import (
    MAKERS,
    ROOT,
    explained,
    is_empty,
    is_indirect,
    matches,
    messages,
    sources,
    template_of,
    unexplained,
)


def test_every_message_of_the_source_is_explained() -> None:
    assert unexplained() == {}


def test_every_message_that_is_explained_is_in_the_source() -> None:
    known = messages()
    assert [one for one in explained() if not any(matches(one, text) for text in known)] == []


def test_no_explanation_is_about_everything() -> None:
    assert [one for one in explained() if is_empty(one)] == []
    assert len(explained()) > 150


def test_errors_whose_text_is_made_elsewhere_are_known_with_who_makes_it() -> None:
    indirect = {path for path, tree in sources() if any(is_indirect(node) for node in ast.walk(tree))}
    assert indirect <= set(MAKERS)
    for path, makers in MAKERS.items():
        source = (ROOT / path).read_text(encoding="utf-8")
        assert [name for name in makers if name not in source] == []


def test_a_message_that_is_new_or_gone_would_be_found() -> None:
    text = template_of(ast.parse('f"the cellar of {host} is flooded by {count} barrels"').body[0].value)  # type: ignore[attr-defined]
    assert text == "the cellar of … is flooded by … barrels"
    assert matches("the cellar of … is flooded…", text)
    assert not any(matches(one, text) for one in explained())
