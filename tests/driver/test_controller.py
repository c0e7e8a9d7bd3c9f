"""The controller's own part of an operation: what the driver is told of replicas that come and go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardray.runtime.cluster.errors import FormError
from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.config import Config, ModelSettings
from shardray.runtime.driver import controller
from shardray.runtime.driver.controller import FleetController
from shardray.runtime.driver.fleet import FleetState
from shardray.runtime.driver.journal_entry import JournalEntry
from shardray.runtime.driver.operations import OperationFailedError, ShapeChange
from shardray.runtime.driver.sqlite_journal import SqliteJournal
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.model.tokenizer import Tokenizer
from tests.serving import Serving, serving
from tests.tiny_models import save_llama

pytestmark = pytest.mark.asyncio


@dataclasses.dataclass
class StubReplicas:
    """One replica, and room for others that cannot be formed."""

    recipe: MeshRecipe
    on_add: Callable[[], None] = lambda: None
    num_added: int = 0

    def __post_init__(self) -> None:
        self.replicas: list[Any] = [self.replica(0)]
        self.reshaped: list[int] = []

    def replica(self, replica_id: int, is_given_up: bool = False) -> Any:
        async def reshape(recipe: MeshRecipe) -> None:
            assert is_given_up, "its shape stays as it is"
            self.reshaped.append(replica_id)

        return SimpleNamespace(replica_id=replica_id, recipe=self.recipe, is_given_up=is_given_up, reshape=reshape)

    async def add(self, num_replicas: int) -> None:
        self.num_added += 1
        self.on_add()
        raise FormError("a host died")

    async def remove(self, replica: Any) -> None:
        self.replicas.remove(replica)


async def scale(up: Serving, fleet: StubReplicas, monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    async def fits(*_: object) -> None:
        """There is room."""

    monkeypatch.setattr(controller, "check_room", fits)
    operator = FleetController(fleet.recipe.config, up.driver, lambda event: None)
    monkeypatch.setattr(operator, "_replicas", fleet)
    async for _ in operator.scale(ShapeChange(replicas=replicas)):
        pass


@pytest.fixture
def recipe() -> MeshRecipe:
    return MeshRecipe(Config(model=ModelSettings(source="stub")), "/nowhere")


async def test_a_replica_that_could_not_be_added_is_not_shown_any_longer(
    tokenizer: Tokenizer, recipe: MeshRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tokenizer) as up:
        fleet = StubReplicas(recipe, lambda: up.driver.fleet.set_loading(1, "importing the runtime"))
        with pytest.raises(OperationFailedError, match="a host died; the fleet runs as before"):
            await scale(up, fleet, monkeypatch, 2)
        status = up.driver.fleet.snapshot()
        assert [(replica.replica_id, replica.state) for replica in status.replicas] == [(0, FleetState.READY)]


async def test_more_replicas_leave_those_that_run_alone(
    tokenizer: Tokenizer, recipe: MeshRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tokenizer) as up:
        fleet = StubReplicas(recipe)
        with pytest.raises(OperationFailedError):
            await scale(up, fleet, monkeypatch, 2)
        assert fleet.num_added == 1


async def test_a_replica_that_was_given_up_is_formed_again_by_a_scale_and_the_others_are_left_alone(
    tokenizer: Tokenizer, recipe: MeshRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tokenizer) as up:
        fleet = StubReplicas(recipe)
        fleet.replicas.append(fleet.replica(1, is_given_up=True))
        await scale(up, fleet, monkeypatch, 2)
        assert (fleet.reshaped, fleet.num_added) == ([1], 0)


async def test_of_surplus_replicas_those_that_were_given_up_go_first(
    tokenizer: Tokenizer, recipe: MeshRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tokenizer) as up:
        fleet = StubReplicas(recipe)
        fleet.replicas.insert(0, fleet.replica(1, is_given_up=True))
        await scale(up, fleet, monkeypatch, 1)
        assert [replica.replica_id for replica in fleet.replicas] == [0]
        assert fleet.reshaped == []


async def test_after_a_reload_the_journal_is_of_the_model_that_is_served(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = save_llama(tmp_path / "before"), save_llama(tmp_path / "after")
    recipe = MeshRecipe(Config(model=ModelSettings(source=str(before))), str(before))
    async with serving(tokenizer) as up:
        fleet = StubReplicas(recipe)
        fleet.replicas = [fleet.replica(0, is_given_up=True)]
        operator = FleetController(recipe.config, up.driver, lambda event: None)
        monkeypatch.setattr(operator, "_replicas", fleet)
        journal = up.driver.journal = SqliteJournal(tmp_path / "journal.db", recipe.config.model.identity)
        journal.open(JournalEntry("a", (1, 2), SamplingParams(max_tokens=5), resumable_s=30))
        async for _ in operator.reload(str(after)):
            pass
        await journal.stop()
    journal = SqliteJournal(tmp_path / "journal.db", ModelSettings(source=str(after)).identity)
    assert [entry.request_id for entry in journal.entries()] == ["a"]
    await journal.stop()
