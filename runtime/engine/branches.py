"""The slots and pages of a request's beams, and who takes them over when beams part or end."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardray.runtime.engine.beams import BeamSearch


@dataclass(slots=True, eq=False)
class Branch:
    """What a beam holds."""

    slot: int
    pages: list[int]
    parent: Branch | None = None  # whose pages it is yet to share; it has none itself


@dataclass(slots=True, eq=False)
class Branches:
    """Of a running request, one for each beam of its search and in their order.

    The first one reads the prompt. Each time a token has come, a beam takes what the one that it continues held. Where
    several continue the same one, all but the first take a slot that is spare, or that of a beam without a sequel.
    """

    search: BeamSearch
    spare_slots: list[int]  # that the request holds, and no branch
    held: list[Branch] = field(default_factory=list)

    @property
    def slots(self) -> list[int]:
        """All that the request holds."""
        return [*self.spare_slots, *(branch.slot for branch in self.held)]

    @property
    def pages(self) -> list[list[int]]:
        """Of each branch that has some."""
        return [branch.pages for branch in self.held if branch.parent is None]

    @property
    def num_new(self) -> int:
        """Branches that are yet to share the pages of another."""
        return sum(branch.parent is not None for branch in self.held)

    def follow(self) -> list[int]:
        """Become those of the search's beams, which have grown by a token; the pages that are to be let go of."""
        before, continued, fresh = self.held, set[int](), list[Branch]()
        self.held = []
        for beam in self.search.beams:
            branch = before[beam.parent]
            if beam.parent in continued:
                branch = Branch(-1, [], branch)
                fresh.append(branch)
            continued.add(beam.parent)
            self.held.append(branch)
        left = [branch for place, branch in enumerate(before) if place not in continued]
        self.spare_slots += [branch.slot for branch in left]
        for branch in fresh:
            branch.slot = self.spare_slots.pop()
        return [page for branch in left for page in reversed(branch.pages)]
