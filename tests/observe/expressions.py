"""The PromQL of deploy/: every expression of the board and of the alerts, and the metrics that they name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

_DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BOARD: dict[str, Any] = json.loads((_DEPLOY / "grafana/shardray.json").read_text(encoding="utf-8"))
ALERTS: dict[str, Any] = yaml.safe_load((_DEPLOY / "prometheus/alerts.yaml").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
EXPRESSIONS = [
    *(target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())),
    *(rule["expr"] for rule in RULES),
]


def parse(expression: str) -> Any:
    """The tree of an expression, as Grafana would send it. Raises ValueError for what is no PromQL."""
    return promql_parser.parse(expression.replace("$__rate_interval", "1m"))


def metrics_of(expression: str) -> set[str]:
    """Raises ValueError for what is no PromQL."""
    return set(_selected(parse(expression)))


def _selected(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
        child = getattr(node, name, None)
        for one in child if isinstance(child, list) else [child]:
            if one is not None and type(one).__module__ == type(node).__module__:
                yield from _selected(one)
