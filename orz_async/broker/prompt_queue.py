"""Which prompt a rollout samples: groups of consecutive rollouts share one, in the seeded order."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class _Group(msgspec.Struct, array_like=True):
    prompt: int
    left: int
    """Rollouts of the group that are not trained yet."""


class PromptQueue(msgspec.Struct):
    """The cursor into the infinite seeded order of prompts, and the groups that hold one now.

    A quarantined prompt is replaced by the next one of the order for every rollout of its group that is granted from
    then on (siblings that are being sampled keep theirs), and is skipped when a later epoch of the data meets it.
    """

    samples_per_prompt: int
    cursor: int = 0
    groups: dict[int, _Group] = msgspec.field(default_factory=dict)
    quarantined: dict[str, str] = msgspec.field(default_factory=dict)
    """Prompt id to reason."""

    def prompt(self, rollout: int, prompt_id: Callable[[int], str]) -> int:
        """The prompt the next attempt at this rollout samples."""
        number = rollout // self.samples_per_prompt
        group = self.groups.get(number)
        if group is None:
            group = self.groups[number] = _Group(self._next(prompt_id), self.samples_per_prompt)
        return group.prompt

    def quarantine(self, rollout: int, prompt: int, reason: str, prompt_id: Callable[[int], str]) -> None:
        self.quarantined[prompt_id(prompt)] = reason
        group = self.groups[rollout // self.samples_per_prompt]
        if group.prompt == prompt:
            group.prompt = self._next(prompt_id)

    def release(self, rollout: int) -> None:
        """The rollout is trained; a group without untrained rollouts is forgotten."""
        number = rollout // self.samples_per_prompt
        group = self.groups[number]
        group.left -= 1
        if group.left == 0:
            del self.groups[number]

    def _next(self, prompt_id: Callable[[int], str]) -> int:
        # Each prompt comes once an epoch, so at a border of epochs a run of quarantined prompts is at most twice as
        # long as their number. Longer means nothing else is left: then use it again rather than block a step.
        for _ in range(2 * len(self.quarantined) + 1):
            index = self.cursor
            self.cursor += 1
            if not self.quarantined or prompt_id(index) not in self.quarantined:
                break
        return index
