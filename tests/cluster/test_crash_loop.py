"""A failure alone is mended at once; failures in a row are mended ever later, and in the end not at all."""

from __future__ import annotations

from shardray.runtime.cluster.crash_loop import CrashLoop


def test_the_first_failure_is_mended_at_once_and_the_next_ones_ever_later() -> None:
    loop = CrashLoop(max_failures=20)
    waits_s = []
    for _ in range(10):
        loop.note_failed_form()
        waits_s.append(loop.back_off_s)
    assert waits_s[:4] == [0.0, 0.25, 0.5, 1.0]
    assert waits_s == sorted(waits_s)
    assert waits_s[-1] == 10.0


def test_a_mesh_that_soon_ends_counts_like_one_that_could_not_be_formed() -> None:
    loop = CrashLoop(max_failures=2)
    loop.note_end(lived_s=0.5)
    assert not loop.is_hopeless
    loop.note_failed_form()
    assert loop.is_hopeless


def test_a_mesh_that_lived_makes_up_for_what_failed_before_it() -> None:
    loop = CrashLoop(max_failures=2)
    loop.note_failed_form()
    loop.note_end(lived_s=60.0)
    loop.note_failed_form()
    assert not loop.is_hopeless
