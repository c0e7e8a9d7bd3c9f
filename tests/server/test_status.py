"""The reasons that docs/security.md promises are those that statuses have."""

from __future__ import annotations

import re
from pathlib import Path

from google.rpc import code_pb2

from shardray.runtime.driver.errors import RetryableError
from shardray.runtime.server.status import _STATUSES

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
_ROW = re.compile(r"^\| ([A-Z_]+) \| ([A-Z_, ]+) \| (.*)\|$", re.MULTILINE)
_UNFORESEEN = ("INTERNAL", "UNFORESEEN", False)


def test_the_page_has_each_reason_with_its_code_and_whether_it_says_when_to_try_again() -> None:
    _, _, section = _PAGE.read_text(encoding="utf-8").partition("### Errors")
    told = [
        (code, reason, details.startswith("RetryInfo"))
        for code, reasons, details in _ROW.findall(section.partition("\n### ")[0])
        for reason in reasons.split(", ")
    ]
    given = [
        (code_pb2.Code.Name(code), reason, issubclass(kind, RetryableError))
        for kind, (code, reason) in _STATUSES.items()
    ]
    assert sorted(told) == sorted([*given, _UNFORESEEN])
