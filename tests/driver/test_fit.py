"""Whether a shape fits into the memory of the hosts, told with numbers before anything is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.config import Config, ModelSettings
from shardray.runtime.driver.fit import Offer, lack_of_memory, load_recipe
from shardray.runtime.model.sources import resolve_model
from tests.tiny_models import save_llama

GIB = 1 << 30


@pytest.mark.parametrize(
    ("needs", "num_replicas", "offer", "reason"),
    [
        ([4, 3], 1, Offer(False, [7]), None),
        ([4, 8], 1, Offer(False, [7]), "rank 1 needs 8.00 GiB for its weights and one sequence, a host has 7.00 GiB"),
        ([4, 3], 2, Offer(False, [7]), "2 × 2 shards need 14.00 GiB for weights and a sequence each, the hosts have"),
        ([4, 3], 2, Offer(False, [7, 7]), None),
        ([4, 3], 9, Offer(True, [8, 8]), None),  # each rank has a GPU of its own
        ([4, 3], 1, Offer(True, [3, 2]), "rank 0 needs 4.00 GiB for its weights and one sequence, a GPU has 3.00 GiB"),
        ([4, 3], 1, Offer(True, []), None),  # no mesh runs that could tell
    ],
)
def test_a_rank_has_a_gpu_of_its_own_and_cpus_share_their_node(
    needs: list[int], num_replicas: int, offer: Offer, reason: str | None
) -> None:
    offered = Offer(offer.is_gpus, [GIB * one for one in offer.num_bytes])
    found = lack_of_memory([GIB * need for need in needs], num_replicas, offered)
    assert found == reason if reason is None else found is not None and found.startswith(reason)


@pytest.mark.asyncio
async def test_hosts_find_what_is_reloaded_by_its_own_name_alone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old, new = save_llama(tmp_path / "old"), shutil.copytree(tmp_path / "old", tmp_path / "new")
    served = Config(model=ModelSettings(source="org/a", revision="1234abc"))
    model = (await load_recipe(MeshRecipe(served, str(old)), str(new))).config.model
    assert resolve_model(model.source, revision=model.revision) == new
