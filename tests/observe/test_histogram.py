"""The histogram that is filled between tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from shardray.runtime.observe.histogram import Histogram

BOUNDS = (0.1, 0.5, 1.0, 2.5)
VALUES = st.lists(st.one_of(st.floats(0, 5), st.sampled_from(BOUNDS)), max_size=40)


@given(VALUES)
def test_it_counts_as_that_of_prometheus_does(values: list[float]) -> None:
    registry, ours = CollectorRegistry(), Histogram(BOUNDS)
    theirs = Reference("seconds", "", buckets=BOUNDS, registry=registry)
    for value in values:
        theirs.observe(value)
        ours.observe(value)
    expected = {s.labels.get("le", s.name): s.value for family in registry.collect() for s in family.samples}
    assert dict(ours.cumulative()) == {bound: expected[bound] for bound in dict(ours.cumulative())}
    assert (ours.count, ours.total) == (expected["seconds_count"], expected["seconds_sum"])
