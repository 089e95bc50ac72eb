"""Accepted trajectories that wait to be trained on: in memory, or still in the journal after a restart."""

from __future__ import annotations

from collections.abc import Iterable

from orz_async.broker.segments import Location, load
from orz_async.records import Trajectory


class Shelf:
    def __init__(self, stored: dict[int, tuple[int, Location]]) -> None:
        """`stored` is what a restart found in the journal: index and place, by rollout. It is read when taken."""
        self._items: dict[int, Trajectory | Location] = {number: place for number, (_, place) in stored.items()}
        self._records = {number: index for number, (index, _) in stored.items()}
        """Journal index of every trajectory that is accepted and not trained."""

    def put(self, trajectory: Trajectory, index: int) -> None:
        self._items[trajectory.rollout] = trajectory
        self._records[trajectory.rollout] = index

    def take(self, number: int) -> Trajectory:
        """For a batch. The journal keeps it until the step is in a checkpoint."""
        item = self._items.pop(number)
        return load(item) if isinstance(item, Location) else item

    def release(self, numbers: Iterable[int]) -> None:
        """Their step has published."""
        for number in numbers:
            del self._records[number]

    def oldest_record(self, default: int) -> int:
        """The first journal record that a restart at this moment would need."""
        return min(self._records.values(), default=default)
