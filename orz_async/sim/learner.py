"""The learner's loop in virtual time: take, train the policy, publish, train the critic, now and then save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orz_async.sim.clock import Clock
from orz_async.sim.models import LearnerModel


class LearnerSide(Protocol):
    """What the learner asks of the hub, and tells it."""

    frozen_until: float
    """The process that both live in is stopped until then."""

    def take(self, step: int) -> None: ...
    def publish(self, version: int) -> None: ...
    def save(self) -> None: ...


class Learner:
    """One life. A killed learner never acts again; the next one is another object."""

    def __init__(
        self,
        model: LearnerModel,
        clock: Clock,
        hub: LearnerSide,
        *,
        version: int,
        steps: int,
        prompt_tokens: float,
        on_step: Callable[[], None],
    ) -> None:
        self.model = model
        self.clock = clock
        self.hub = hub
        self.version = version
        self.steps = steps
        self.alive = True
        self.done = False
        self.waited_s = 0.0
        self.step_ends: list[float] = []
        self.step_waits: list[float] = []
        self._prompt_tokens = prompt_tokens
        self._on_step = on_step
        self._asked_at = 0.0
        self._tokens = 0.0

    def begin(self) -> None:
        self.hub.publish(self.version)
        if self.version == self.steps:
            # The last step was saved, and the learner killed before it could say so.
            self.done = True
            self._on_step()
        self._take()

    def _take(self) -> None:
        if self.version < self.steps:
            self._asked_at = self.clock.now
            self.hub.take(self.version)

    def receive(self, rollouts: int, response_tokens: int) -> None:
        """The batch of the step."""
        waited = self.clock.now - self._asked_at
        self.waited_s += waited
        self.step_waits.append(waited)
        self._tokens = response_tokens + rollouts * self._prompt_tokens
        self.clock.after(self.model.fixed_s + self.model.policy_s * self._tokens + self.model.publish_s, self._publish)

    def _is_frozen(self, then: Callable[[], None]) -> bool:
        if self.hub.frozen_until > self.clock.now:
            self.clock.at(self.hub.frozen_until, then)
            return True
        return False

    def _publish(self) -> None:
        if self.alive and not self._is_frozen(self._publish):
            self.version += 1
            self.hub.publish(self.version)
            self.clock.after(self.model.critic_s * self._tokens, self._finish_step)

    def _finish_step(self) -> None:
        if not self.alive or self._is_frozen(self._finish_step):
            return
        if self.version % self.model.checkpoint_every == 0 or self.version == self.steps:
            self.hub.save()
            self.clock.after(self.model.checkpoint_s, self._end_step)
        else:
            self._end_step()

    def _end_step(self) -> None:
        if self.alive and not self._is_frozen(self._end_step):
            self.step_ends.append(self.clock.now)
            self.done = self.version == self.steps
            self._on_step()
            self._take()
