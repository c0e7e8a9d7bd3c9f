"""Two meshes of one machine on the same weights: the same tokens as ever, and one copy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shardray.parallel.layers import can_share
from shardray.runtime.engine.request import EngineRequest, SamplingParams
from shardray.runtime.model.sources import resolve_model
from tests.ranks import Arrival, RankPool
from tests.tiny_models import Reference, save_llama

PARAMS = SamplingParams(seed=0, temperature=0.0, max_tokens=12, ignore_eos=True)
ARRIVALS = [
    Arrival(EngineRequest(request_id=f"r{n}", prompt_ids=(3 + n,) * (7 * n + 1), params=PARAMS)) for n in range(4)
]


@contextmanager
def two_pools(size: int) -> Iterator[tuple[RankPool, RankPool]]:
    pools = RankPool(size), RankPool(size)
    try:
        yield pools
    finally:
        for pool in pools:
            pool.close()


def shared_kib(pid: int) -> int:
    """Of weights: resident pages of which another process maps the same ones."""
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    found = re.findall(r"memfd:shardray-weights.*?Shared_Clean:\s+(\d+).*?Shared_Dirty:\s+(\d+)", smaps, re.DOTALL)
    return sum(int(clean) + int(dirty) for clean, dirty in found)


def test_a_second_mesh_has_the_tokens_of_transformers_and_of_ranks_that_share(tmp_path: Path) -> None:
    tiny = Reference(save_llama(tmp_path))
    expected = [tiny.greedy(arrival.request.prompt_ids, 12) for arrival in ARRIVALS]
    with two_pools(2) as (first, second), first.mesh(tiny.folder, 2, 1, share_weights=True) as one:
        before = [shared_kib(pid) for pid in first.pids]
        with second.mesh(tiny.folder, 2, 1, share_weights=True) as other:
            assert before == [0, 0], "the ranks of one mesh hold different weights"
            assert all(shared_kib(pid) > 0 for pid in second.pids)
            for mesh in (one, other):
                served = mesh.serve(ARRIVALS)
                assert [served.token_ids(arrival.request.request_id) for arrival in ARRIVALS] == expected
        assert [shared_kib(pid) for pid in first.pids] == [0, 0], "who leaves a mesh lets go of them"


@pytest.mark.skipif(not can_share("cpu", torch.bfloat16), reason="oneDNN's weights cannot be shared")
def test_packed_weights_of_the_real_model_are_there_once(tmp_path: Path) -> None:
    folder = resolve_model("smollm2-135m")
    fields = {"dtype": "bfloat16", "max_num_seqs": 4}
    with two_pools(1) as (first, second):
        with first.mesh(folder, 1, 1, **fields) as mesh:
            expected = mesh.serve(ARRIVALS).outputs
        with first.mesh(folder, 1, 1, share_weights=True, **fields) as one:
            with second.mesh(folder, 1, 1, share_weights=True, **fields) as other:
                found = [mesh.serve(ARRIVALS).outputs for mesh in (one, other)]
                weight_kib = other.infos[0].weight_bytes // 1024
                assert shared_kib(second.pids[0]) > 0.7 * weight_kib, (
                    "rows of the embedding that are not read are not mapped"
                )
    tokens = [{name: [out.token_id for out in outputs] for name, outputs in one.items()} for one in (expected, *found)]
    assert tokens[1] == tokens[0]
    assert tokens[2] == tokens[0]
