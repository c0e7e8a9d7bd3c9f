"""How fast hosts are: between measured points, beyond them, and when they share a machine."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardray.runtime.engine.hardware import Hardware, Machine, Roofline, Speed
from shardray.runtime.model.costs import Work

MEASURED = Roofline(((1.0, 1e-9), (4.0, 1e-9), (16.0, 2e-9), (64.0, 8e-9)))


@given(flops=st.floats(0, 1e15), num_bytes=st.floats(1, 1e12))
def test_two_figures_make_the_textbook_s_roofline(flops: float, num_bytes: float) -> None:
    expected = max(flops / 3e12, num_bytes / 2e9)
    assert Roofline.of(2e9, 3e12).time_s(Work(flops, num_bytes)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("intensity", "byte_s"), [(0.5, 1e-9), (1, 1e-9), (3, 1e-9), (10, 1.5e-9), (16, 2e-9), (64, 8e-9), (640, 80e-9)]
)
def test_between_measured_points_lie_straight_lines(intensity: float, byte_s: float) -> None:
    assert MEASURED.time_s(Work(100 * intensity, 100)) == pytest.approx(100 * byte_s)


def test_nothing_to_read_takes_no_time() -> None:
    assert MEASURED.time_s(Work()) == 0.0


def test_a_host_among_busy_ones_has_its_share_of_the_machine_and_no_more_than_alone() -> None:
    decodes = Roofline(((2.0, 3e-9),))
    own, full = Speed(MEASURED, 20.0, decodes, 8.0), Speed(MEASURED, 15.0, decodes, 7.0)
    hardware = dataclasses.replace(Hardware.of(1, 1, 1, 0), speed=own, machine=Machine(2, full))
    assert hardware.beside(1).speed == own
    assert hardware.beside(2).speed == full
    crowded = hardware.beside(4).speed
    assert (crowded.memory_bytes_per_s, crowded.prefill_flops_per_s) == (7.5, 3.5)
    assert crowded.attention_time_s(Work(4, 2), is_decode=True) == pytest.approx(12e-9)
    assert crowded.products.time_s(Work(16, 1)) == pytest.approx(4e-9)


def test_replicas_are_busy_whatever_the_ranks_of_one_do() -> None:
    speed = Speed(MEASURED, 20.0, MEASURED, 8.0)
    hardware = dataclasses.replace(Hardware.of(1, 1, 1, 0), speed=speed, machine=Machine(2, speed))
    assert hardware.among(4).beside(1).speed.memory_bytes_per_s == 10.0
    assert hardware.among(2).beside(2).speed.memory_bytes_per_s == 10.0
    assert hardware.among(2).beside(1).speed == speed
