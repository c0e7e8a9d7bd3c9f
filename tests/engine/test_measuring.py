"""What is measured of this machine, and a forecast that is held against steps as they are."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.forecast import ForecastSetup, measure
from shardray.runtime.engine.hardware import Roofline, Speed
from shardray.runtime.engine.measuring import measure_hardware
from shardray.runtime.engine.served import read_served
from tests.model.zoo import save
from tests.tiny_models import save_llama

TOLERANCE = 0.5
NUM_TRIES = 3  # other programs may come between measuring and timing
BOUNDS = SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64, block_size=16)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "bfloat16"), ("llama", "float32"), ("mixtral", "bfloat16"), ("bloom", "bfloat16")]
)
def test_every_figure_is_found_for_models_of_several_kinds(name: str, dtype: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path) if name == "llama" else save(name, tmp_path)
    hardware = measure_hardware(read_served(folder, dtype, None, BOUNDS), 2, 1)
    assert hardware.machine is not None
    for speed in (hardware.speed, hardware.machine.speed):
        points = speed.products.points
        assert all(earlier[0] < later[0] for earlier, later in itertools.pairwise(points))
        assert points[-1][1] > points[0][1]  # many tokens take longer than reading the weights
        assert min(speed.memory_bytes_per_s, speed.prefill_flops_per_s) > 1e8
        assert all(0 < byte_s < 1e-7 for _, byte_s in speed.decode_attention.points)
    assert 0 < hardware.message_s < 1e-2
    assert hardware.link_bytes_per_s > 1e7
    for launches in (hardware.decode_launches, hardware.prefill_launches):
        assert 0 < launches.time_s(num_layers=2, num_seqs=1) < 0.1


@pytest.mark.integration
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2)])
def test_a_forecast_is_near_what_steps_take(tp_size: int, pp_size: int) -> None:
    decodes = ((1, 128), (8, 128), (32, 128))
    setup = ForecastSetup("smollm2-135m", "bfloat16", tp_size, pp_size, 1, decodes, (128, 512))
    tries = []
    for _ in range(NUM_TRIES):
        tries.append([*measure(setup)])
        if all(abs(one.ratio - 1) < TOLERANCE for one in tries[-1]):
            return
    pytest.fail("\n".join(str(one) for found in tries for one in found))


def speed(byte_s: float, flops_per_s: float) -> Speed:
    return Speed(Roofline(((1.0, byte_s), (8.0, 2 * byte_s))), 1 / byte_s, Roofline(((2.0, byte_s),)), flops_per_s)


def test_a_round_beside_other_work_changes_no_figure_but_is_told() -> None:
    rounds = [speed(1e-10, 5.0), speed(4e-10, 1.0), speed(1.2e-10, 4.0)]
    assert Speed.median(rounds) == speed(1.2e-10, 4.0)
    assert Speed.spread(rounds) == pytest.approx(4)
    assert Speed.spread(rounds[:1]) == 1
