"""Chat templates: what they may use, and how they fail."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from shardray.runtime.model.chat_template import WORKER, ChatTemplate, ChatTemplateError
from shardray.runtime.model.sandbox import Sandbox

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
        ("{{ {'b': 'é', 'a': [1, 2]} | tojson(separators=(',', ':'), sort_keys=True) }}", '{"a":[1,2],"b":"é"}'),
        ("{{ 'é' | tojson(ensure_ascii=True) }}{{ 'é' | tojson(ensure_ascii=False) }}", '"\\u00e9""é"'),
        ("{{ [1] | tojson(False, 1) }}", "[\n 1\n]"),
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


BOUNDED = Sandbox(WORKER, "the model's chat template", max_memory_bytes=300 << 20, max_processor_s=0.3)
_MANY = "{% for i in range(99999) %}{% for j in range(99999) %}"
_ENDS = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        (f"{_MANY}spam{_ENDS}", "more than 1000 characters"),
        (f"{_MANY}{_ENDS}", "more than 0.3 s of processor time"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion|processor time"),
        ("{% set n = messages | length %}{{ 9**(9**(9 * n)) }}", "processor time"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{% set x = messages[0].content * 9**9 * 9 %}{{ x }}", "MemoryError"),
        ("{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 40 + "{{ x | length }}", "MemoryError|processor time"),
        ("{{ '%999999999d' % 1 }}", "MemoryError"),
        ("{{ 'x' | center(10**10) }}", "MemoryError"),
        ("{{ [0] * 10**9 }}", "MemoryError"),
    ],
)
def test_a_hostile_template_ends_with_an_error_and_the_next_one_renders(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source, {}, BOUNDED, max_chars=1000).render(MESSAGES)
    assert ChatTemplate("{{ messages[0].content }}", {}, BOUNDED).render(MESSAGES) == "hi"


def test_after_ctrl_c_in_the_middle_of_one_rendering_the_next_has_its_own_answer(
    request: pytest.FixtureRequest,
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    process = Sandbox(WORKER, "the template")
    slow = ChatTemplate("{% for i in range(9999) %}{% for j in range(999) %}{% endfor %}{% endfor %}slow", {}, process)
    interrupt = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        slow.render(MESSAGES)
    assert ChatTemplate("{{ messages[0].content }}", {}, process).render(MESSAGES) == "hi"
    process.close()


def test_a_process_that_ends_just_before_it_is_asked_is_an_error_and_the_next_one_renders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = Sandbox(WORKER, "the template")
    template = ChatTemplate("{{ messages[0].content }}", {}, process)
    assert process._process is not None
    process._process.kill()
    os.waitid(os.P_PID, process._process.pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(process._process, "poll", lambda: None)  # it was looked at before
    with pytest.raises(ChatTemplateError, match="ended with code -9"):
        template.render(MESSAGES)
    assert template.render(MESSAGES) == "hi"
    process.close()


def test_what_another_process_renders_comes_back_as_it_was() -> None:
    text = "é\n\U0001f600\u2028\r\n\0 end"
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": text}]) == text


def test_the_process_ends_with_its_owner() -> None:
    code = (
        "from shardray.runtime.model.chat_template import SHARED, ChatTemplate\n"
        "ChatTemplate('x', {})\n"
        "print(SHARED.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(5)
    assert done.stderr == ""


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
