"""The labels that a PromQL expression gives, from those that the catalog's metrics have. Follows the rules of
https://prometheus.io/docs/prometheus/latest/querying/operators/ as far as the expressions of deploy/ go."""

from __future__ import annotations

from typing import Any

import promql_parser as promql

from shardray.runtime.observe.catalog import METRICS
from tests.observe.expressions import parse

_TARGET = {"job", "instance"}  # what Prometheus adds to every series of a scrape
_LABELS = {metric.exported_name: _TARGET.union(metric.labels) for metric in METRICS if metric.kind != "histogram"}
for _histogram in (metric for metric in METRICS if metric.kind == "histogram"):
    _labels = _TARGET.union(_histogram.labels)
    _LABELS |= {f"{_histogram.name}_{part}": _labels for part in ("sum", "count")}
    _LABELS[f"{_histogram.name}_bucket"] = _labels | {"le"}
# Made by Prometheus, and by its client library.
_LABELS |= {"up": _TARGET, "process_cpu_seconds_total": _TARGET}


def series_labels(name: str) -> set[str]:
    """Of a series as a scrape shows it. Raises ValueError for one that nobody exports."""
    if name not in _LABELS:
        raise ValueError(f"no metric is exported as {name}")
    return _LABELS[name]


def labels_of(expression: str) -> set[str]:
    """Raises ValueError where a label is selected, grouped by or matched on that the series there have not got."""
    return _labels_of(parse(expression)) or set()


def _labels_of(node: Any) -> set[str] | None:
    """None for a scalar."""
    match node:
        case promql.NumberLiteral() | promql.StringLiteral():
            return None
        case promql.VectorSelector():
            return _holding(series_labels(node.name), {matcher.name for matcher in node.matchers.matchers}, node)
        case promql.MatrixSelector():
            return _labels_of(node.vector_selector)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return _labels_of(node.expr)
        case promql.AggregateExpr():
            return _of_aggregation(node)
        case promql.Call():
            return _of_call(node)
        case promql.BinaryExpr():
            return _of_pair(node)
    raise ValueError(f"{type(node).__name__} is not known here: {node}")


def _holding(labels: set[str] | None, wanted: set[str], node: Any) -> set[str]:
    if missing := wanted - (labels or set()):
        raise ValueError(f"no label {sorted(missing)} in {node.prettify()}")
    return labels or set()


def _of_aggregation(node: Any) -> set[str]:
    named = set(node.modifier.labels) if node.modifier else set()
    labels = _holding(_labels_of(node.expr), named, node)
    return labels - named if node.modifier and node.modifier.type == promql.AggModifierType.Without else named


def _of_call(node: Any) -> set[str] | None:
    of_vectors = [labels for labels in map(_labels_of, node.args) if labels is not None]
    labels = of_vectors[0] if of_vectors else None
    if node.func.name == "histogram_quantile":
        return _holding(labels, {"le"}, node) - {"le"}
    return labels


def _of_pair(node: Any) -> set[str] | None:
    left, right = _labels_of(node.lhs), _labels_of(node.rhs)
    if left is None or right is None:
        return right if left is None else left
    if node.modifier is None or node.modifier.matching is None:
        if left != right:
            raise ValueError(f"{sorted(left)} are matched with {sorted(right)} in {node.prettify()}")
        return left
    matching, card = node.modifier.matching, node.modifier.card
    if matching.type != promql.LabelModifierType.Include or card == promql.VectorMatchCardinality.OneToMany:
        raise ValueError(f"ignoring and group_right are not known here: {node.prettify()}")
    named = set(matching.labels)
    for side in (left, right):
        _holding(side, named, node)
    if card == promql.VectorMatchCardinality.OneToOne:
        return named
    return left | set(node.modifier.group_labels or ())  # `and`, `or` and `unless` too: many with many
