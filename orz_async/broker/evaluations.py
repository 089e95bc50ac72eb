"""Evaluation rollouts: their own numbers, no slots, no training. Rollout version * E + i is sample i of that version.

Nothing here survives a restart of the learner: it asks for the evaluation again, and because numbers and seeds follow
from the version, the same leases go out.
"""

from __future__ import annotations

from heapq import heappush

from orz_async.broker.rollouts import Rollout, State
from orz_async.broker.transitions import LedgerConfig


class Evaluations:
    def __init__(self, config: LedgerConfig) -> None:
        self.config = config
        self.rollouts: dict[int, Rollout] = {}
        """Not READY yet, of all evaluations under way."""
        self.lost: list[int] = []
        """Heap of those in state LOST: to be granted."""
        self.attempts: dict[int, int] = {}
        """Accepted attempts, by rollout."""
        self._left: dict[int, int] = {}
        """Rollouts that have not ended, by version."""

    def start(self, version: int) -> bool:
        """False if this version is or was being evaluated."""
        if version in self._left:
            return False
        size = self.config.eval_rollouts
        self._left[version] = size
        for number in range(version * size, (version + 1) * size):
            index = number - version * size
            prompt, sample = divmod(index, self.config.eval_samples)
            self.rollouts[number] = Rollout("eval", number, version, prompt=prompt, sample=sample, attempt=-1)
            heappush(self.lost, number)
        return True

    def grant(self, rollout: Rollout) -> None:
        rollout.attempt += 1
        rollout.state = State.HELD

    def accept(self, rollout: Rollout) -> None:
        rollout.state = State.READY
        self.attempts[rollout.number] = rollout.attempt
        self._end(rollout)

    def end(self, rollout: Rollout, cause: str, blamed: bool) -> str:
        """End an attempt. After too many failures the rollout is given up: an evaluation never hangs on one prompt."""
        rollout.state = State.LOST
        rollout.failures += blamed
        if not blamed or rollout.failures < self.config.max_attempts:
            heappush(self.lost, rollout.number)
            return ""
        self._end(rollout)
        return f"{rollout.failures} attempts at evaluation rollout {rollout.number} failed, the last one: {cause}"

    def complete(self, version: int) -> bool:
        return self._left.get(version) == 0

    def was_started(self, number: int) -> bool:
        return self.config.eval_rollouts > 0 and self.version_of(number) in self._left

    def version_of(self, number: int) -> int:
        return number // self.config.eval_rollouts

    def _end(self, rollout: Rollout) -> None:
        del self.rollouts[rollout.number]
        self._left[self.version_of(rollout.number)] -= 1
