"""The Grafana board and the alert rules. That their metrics move: tests/integration/test_observed_fleet.py."""

from __future__ import annotations

import re

import promql_parser
import pytest

from tests.observe.expressions import ALERTS, BOARD, EXPRESSIONS, RULES, metrics_of


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_promql_and_names_a_metric(expression: str) -> None:
    assert metrics_of(expression)


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
