"""The Grafana board and the alert rules. That their metrics move: tests/integration/test_observed_fleet.py."""

from __future__ import annotations

import json
import re

import promql_parser
import pytest

from tests.observe.expressions import ALERTS, BOARD, EXPRESSIONS, RULES, metrics_of
from tests.observe.labels import labels_of, series_labels

TARGETS = [target for panel in BOARD["panels"] for target in panel.get("targets", ())]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_promql_over_metrics_and_labels_that_are_exported(expression: str) -> None:
    assert metrics_of(expression)
    labels_of(expression)


@pytest.mark.parametrize(
    "wrong",
    [
        "sum by (replica) (shardray:kv_tokens)",
        "sum without (replica) (shardray:kv_tokens)",
        'shardray:calls_total{model_name="a"}',
        "shardray:calls",  # counters are exported as _total
        "histogram_quantile(0.5, sum(rate(vllm:time_to_first_token_seconds_bucket[1m])))",
        "sum by (engine) (shardray:kv_tokens) / sum(shardray:kv_tokens)",
        "up and on (job, engine) shardray:kv_tokens",
    ],
)
def test_a_label_that_is_not_there_would_be_noticed(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^(no label|no metric|\[.*\] are matched with)"):
        labels_of(wrong)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"])
def test_a_legend_names_labels_that_its_curves_have(target: dict[str, str]) -> None:
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels_of(target["expr"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_tells_labels_that_its_expression_gives(rule: dict[str, str]) -> None:
    assert set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))) <= labels_of(rule["expr"])


def test_the_boards_variables_are_labels_of_their_metrics() -> None:
    definitions = [one["definition"] for one in BOARD["templating"]["list"] if one["type"] == "query"]
    assert definitions
    for definition in definitions:
        name, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", definition).groups()  # type: ignore[union-attr]
        assert label in series_labels(name)


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert set(ALERTS) == {"groups"}
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_no_alert_depends_on_how_an_operator_has_called_the_job() -> None:
    """A driver that is down answers with none of its metrics: an alert that waits for another name would never come."""
    assert [rule["alert"] for rule in RULES if re.search(r'\b(job|instance)\s*(=|=~|!=|!~)\s*"', rule["expr"])] == []
    [down] = [promql_parser.parse(rule["expr"]) for rule in RULES if rule["alert"] == "ShardrayDown"]
    assert (str(down.op), str(down.lhs), str(down.modifier)) == ("and", "up{} == 0", "on (job, instance)")
    assert metrics_of(str(down.rhs)) == {"shardray:build_info"}


def test_no_alert_compares_shards_by_times_that_hold_waits() -> None:
    """With one step under way a stage's time is that of all before it too, and tensor ranks wait for the slowest."""
    assert "shardray:shard_step_seconds_total" not in set().union(*(metrics_of(rule["expr"]) for rule in RULES))


def test_the_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_reads_from_the_source_that_is_chosen_on_the_board() -> None:
    sources = {target["datasource"]["uid"] for panel in BOARD["panels"] for target in panel.get("targets", ())}
    assert sources == {"${datasource}"}
