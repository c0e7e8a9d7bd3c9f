"""Chat templates: what they may use, and how they fail."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from shardray.runtime.model import chat_template
from shardray.runtime.model.chat_template import ChatTemplate, ChatTemplateError

MESSAGES = [{"role": "user", "content": "hi"}]


def render(source: str, **special_tokens: str) -> str:
    return ChatTemplate(source, special_tokens).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m.content }}{% endfor %}", "<s>user: hi"),
        ("{% if true %}\n  {% set x = 1 %}\nkept\n{% endif %}\n", "kept\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'a': '<é>'} | tojson(indent=2) }}", '{\n  "a": "<é>"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{{ 1 + 1 }}{% endgeneration %}y", "x2y"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
        ("{% if tools is none and documents is none and not undefined_name %}ok{% endif %}", "ok"),
        ("{{ 'go' if add_generation_prompt }}", "go"),
    ],
)
def test_templates_find_the_names_they_expect(source: str, expected: str) -> None:
    assert render(source, bos_token="<s>") == expected


def test_a_template_that_refuses_the_messages_says_why() -> None:
    with pytest.raises(ChatTemplateError, match="refused the messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("source", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages.append(1) }}"])
def test_a_template_that_fails_is_a_clear_error(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="chat template failed"):
        render(source)


def test_a_template_that_is_not_jinja_is_refused_when_loaded() -> None:
    with pytest.raises(ChatTemplateError, match="not valid"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('true') }}"],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source)


def test_a_template_that_renders_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(ChatTemplateError, match="more than 1000 characters"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}spam{% endfor %}{% endfor %}")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "plain"}, "plain"),
        ({"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}, "b"),
        ({"chat_template": "{{ eos_token }}", "eos_token": {"content": "</s>"}}, "</s>"),
    ],
)
def test_templates_are_found_in_the_tokenizer_config(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == expected


def test_a_template_file_wins_over_the_config_and_none_is_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config"}')
    (tmp_path / "chat_template.jinja").write_text("file")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "file"
