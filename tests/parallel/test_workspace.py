"""Memory that is used again: never by two tensors that live at once, and never taken from who still needs it."""

from __future__ import annotations

import pytest
import torch

from shardray.parallel.kernels.linear import PackedLinear, cpu_features, variant_for
from shardray.parallel.kernels.program import Recorder
from shardray.parallel.workspace import Workspace, empty

SHAPES = ((3, 5), (7, 2, 4), (1,), (0, 6))
KINDS = (torch.float32, torch.bfloat16)


def test_tensors_of_two_turns_are_apart() -> None:
    workspace, live = Workspace(), []
    with workspace.active():
        for number in range(12):
            if number % 3 == 0:
                workspace.new_turn()
                live = [one for one in live if one[0] >= number - 3]
            tensor = empty(SHAPES[number % 4], KINDS[number % 2])
            assert (tensor.shape, tensor.dtype) == (SHAPES[number % 4], KINDS[number % 2])
            tensor.fill_(number)
            live.append((number, tensor))
            for filled_with, earlier in live:
                assert torch.all(earlier == filled_with)


def test_a_turn_after_the_next_gets_the_same_memory() -> None:
    workspace, places = Workspace(), []
    with workspace.active():
        for _ in range(4):
            workspace.new_turn()
            places.append(empty((4, 4), torch.float32).data_ptr())
    assert places[:2] == places[2:]
    assert places[0] != places[1]


@pytest.mark.parametrize("rows", [2, 300])
def test_a_recorded_program_keeps_its_memory_when_a_larger_one_is_asked_for(rows: int) -> None:
    torch.manual_seed(0)
    workspace, recorder = Workspace(), Recorder()
    linears = [PackedLinear(torch.randn(64, 64).bfloat16() / 8, None, variant_for(cpu_features()) or "halves")] * 6
    x = torch.randn(rows, 64).bfloat16()

    def run(x: torch.Tensor) -> torch.Tensor:
        with workspace.active():
            for linear in linears:
                workspace.new_turn()
                x = linear(x)
        return x

    with torch.inference_mode():
        run(x)
        out, program = recorder.record(lambda: run(x))
        assert program is not None
        expected = out.clone()
        kept = [run(torch.randn(4 * rows, 64).bfloat16()), torch.full((1 << 20,), 7, dtype=torch.uint8)]
        out.zero_()
        program.run()
        assert torch.equal(out, expected)
        assert torch.all(kept[1] == 7)
