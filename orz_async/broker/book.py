"""The ledger's memory of training rollouts: everything that must survive a restart, and the moves between its states.

The book knows nothing of generators' connections, deadlines or messages; `ledger.py` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from heapq import heapify, heappop, heappush

from orz_async.broker.prompt_queue import PromptQueue
from orz_async.broker.rollouts import Counts, Rollout, State
from orz_async.broker.transitions import LedgerConfig


class Book:
    """Rollouts that hold a slot, by number; see `ledger.py` for the arithmetic and what it promises."""

    def __init__(self, config: LedgerConfig, prompt_id: Callable[[int], str]) -> None:
        self.config = config
        self.prompt_id = prompt_id
        self.version = 0
        self.tightened = 0
        """Versions by which the learner lowered S for the time being; not part of a snapshot."""
        self.limit = self._limit()
        """Rollouts below this number may be granted at the present version."""
        self.next_rollout = 0
        """Rollouts below this number have been granted at least once."""
        self.rollouts: dict[int, Rollout] = {}
        self.lost: list[int] = []
        """Heap of the rollouts in state LOST."""
        self.num_ready = 0
        self.taken: tuple[int, ...] = ()
        """The batch that is being trained on."""
        self.bound: dict[int, tuple[int, ...]] = {}
        """Batches decided before a restart, by step: they are composed the same way again."""
        self.prompts = PromptQueue(config.samples_per_prompt)
        self.counts = Counts()
        self.odd_attempts: dict[int, int] = {}
        """Accepted attempts of trained rollouts, where it was not attempt 0."""
        self._ready: list[int] = []
        """Heap of the rollouts that became READY; some may be TAKEN or trained by now."""
        self._open: Counter[int] = Counter()
        """By nominal step: rollouts LOST or HELD."""

    @property
    def head_start(self) -> int:
        """S - W, or less while it is tightened. Admission then only comes later, so every bound still holds."""
        return max(0, self.config.head_start - self.tightened)

    def floor(self, number: int) -> int:
        """The oldest version that may sample this rollout."""
        return max(0, number // self.config.rollouts_per_step - self.head_start)

    def tighten(self, by: int) -> None:
        self.tightened = by
        self.limit = self._limit()

    def _limit(self) -> int:
        steps = min(self.version + self.head_start + 1, self.config.total_steps)
        return steps * self.config.rollouts_per_step

    @property
    def num_grantable(self) -> int:
        return len(self.lost) + max(0, self.limit - self.next_rollout)

    def has_work(self, version: int) -> bool:
        """Whether a generator that serves this version could be granted anything."""
        if self.lost and self.rollouts[self.lost[0]].floor <= version:
            return True
        return self.next_rollout < self.limit and self.floor(self.next_rollout) <= version

    def accepted_attempt(self, number: int) -> int | None:
        """The attempt whose trajectory counts; None if there is none yet."""
        if not 0 <= number < self.next_rollout:
            return None
        rollout = self.rollouts.get(number)
        if rollout is None:
            return self.odd_attempts.get(number, 0)
        return rollout.attempt if rollout.state in (State.READY, State.TAKEN) else None

    def admit(self) -> Rollout:
        """Give the next rollout its slot."""
        number = self.next_rollout
        self.next_rollout += 1
        sample = number % self.config.samples_per_prompt
        rollout = Rollout("train", number, self.floor(number), prompt=-1, sample=sample, attempt=-1)
        self.rollouts[number] = rollout
        self._open[number // self.config.rollouts_per_step] += 1
        return rollout

    def grant(self, rollout: Rollout) -> None:
        """Start the next attempt. The caller has removed a LOST rollout from `lost`."""
        prompt = self.prompts.prompt(rollout.number, self.prompt_id)
        if prompt != rollout.prompt:
            rollout.prompt, rollout.failures = prompt, 0
        rollout.attempt += 1
        rollout.state = State.HELD
        self.counts.granted += 1

    def accept(self, rollout: Rollout, version_first: int) -> None:
        assert rollout.state is State.HELD, rollout
        rollout.state = State.READY
        rollout.version_first = version_first
        self.num_ready += 1
        self._open[rollout.number // self.config.rollouts_per_step] -= 1
        heappush(self._ready, rollout.number)

    def end(self, rollout: Rollout, cause: str, blamed: bool) -> str:
        """End the current attempt without a trajectory. Returns why its prompt is given up, or nothing."""
        assert rollout.state is State.HELD, rollout
        rollout.state = State.LOST
        rollout.failures += blamed
        heappush(self.lost, rollout.number)
        if not blamed or rollout.failures < self.config.max_attempts:
            self.counts.expired[cause] = self.counts.expired.get(cause, 0) + 1
            return ""
        reason = f"{rollout.failures} attempts at rollout {rollout.number} failed, the last one: {cause}"
        self.prompts.quarantine(rollout.number, rollout.prompt, reason, self.prompt_id)
        self.counts.quarantined += 1
        return reason

    def compose(self, step: int) -> tuple[int, ...] | None:
        """The batch of this step, oldest rollout first, or None while it is not complete."""
        if bound := self.bound.get(step):
            return bound if all(self.rollouts[n].state is State.READY for n in bound) else None
        size = self.config.rollouts_per_step
        mandatory = step - self.config.window
        if self.num_ready < size or self.next_rollout < (mandatory + 1) * size or self._open[mandatory] > 0:
            return None
        batch: list[int] = []
        while len(batch) < size:
            number = heappop(self._ready)
            rollout = self.rollouts.get(number)
            if rollout is not None and rollout.state is State.READY:
                batch.append(number)
        return tuple(batch)

    def take(self, batch: tuple[int, ...]) -> None:
        assert not self.taken, "the step before has not published"
        for number in batch:
            rollout = self.rollouts[number]
            assert rollout.state is State.READY, rollout
            rollout.state = State.TAKEN
        self.num_ready -= len(batch)
        self.taken = batch

    def publish(self) -> None:
        """The step trained on the taken batch: its rollouts give up their slots."""
        assert self.taken, f"version {self.version + 1} was published without a batch"
        for number in self.taken:
            rollout = self.rollouts.pop(number)
            self.prompts.release(number)
            if rollout.attempt != 0:
                self.odd_attempts[number] = rollout.attempt
        self.counts.trained += len(self.taken)
        self.bound.pop(self.version, None)
        self._open.pop(self.version - self.config.window, None)
        self.taken = ()
        self.version += 1
        self.limit = self._limit()

    def restart(self, lost: Collection[int] = ()) -> list[tuple[Rollout, str]]:
        """The learner died: undo the batch in training and end what is held, unblamed; also the accepted rollouts
        `lost`, whose trajectories nobody has. Returns the rollouts whose attempts ended, with the cause.
        """
        if self.taken:
            self.bound[self.version] = self.taken
        self.taken = ()
        ended = []
        for rollout in self.rollouts.values():
            if rollout.state is State.TAKEN:
                rollout.state = State.READY
            if rollout.state is State.HELD:
                ended.append((rollout, "learner_restart"))
            elif rollout.state is State.READY and rollout.number in lost:
                rollout.state = State.HELD
                ended.append((rollout, "journal_lost"))
        for rollout, cause in ended:
            self.end(rollout, cause, blamed=False)
        self.reindex()
        return ended

    def reindex(self) -> None:
        """Build everything that follows from version and `rollouts` anew."""
        self.limit = self._limit()
        states = [(number, rollout.state) for number, rollout in self.rollouts.items()]
        self.lost = [number for number, state in states if state is State.LOST]
        self._ready = [number for number, state in states if state is State.READY]
        heapify(self.lost)
        heapify(self._ready)
        self.num_ready = len(self._ready)
        waiting = (State.LOST, State.HELD)
        self._open = Counter(n // self.config.rollouts_per_step for n, state in states if state in waiting)
