"""The table of metrics in the operator's guide is the catalog's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from shardray.runtime.observe.catalog import METRICS, markdown

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
TABLE = re.compile(r"(<!-- metrics: [^\n]* -->\n)(.*?)(<!-- end of metrics -->)", re.DOTALL)


def test_the_table_in_the_guide_is_the_catalog() -> None:
    found = TABLE.search(GUIDE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2].strip() == markdown().strip(), "run python -m tests.observe.test_catalog"


def test_names_are_unique_and_their_units_stand_in_them() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"(vllm|shardray):[a-z0-9_]+", metric.name)
        assert not metric.name.endswith("_total")
        if metric.unit in ("seconds", "bytes"):
            assert metric.name.endswith(metric.unit)


if __name__ == "__main__":
    text = TABLE.sub(lambda found: f"{found[1]}\n{markdown()}\n{found[3]}", GUIDE.read_text(encoding="utf-8"))
    sys.exit(GUIDE.write_text(text, encoding="utf-8") == 0)
