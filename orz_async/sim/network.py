"""Messages between generators and the hub: late, lost, twice, out of order, or cut off for a while."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from orz_async.sim.clock import Clock
from orz_async.sim.models import NetworkModel


class Network:
    """Without delay and trouble a message is a call, which is what makes thousands of generators affordable."""

    def __init__(self, model: NetworkModel, clock: Clock, random: Random) -> None:
        self.model = model
        self.clock = clock
        self.random = random
        self.is_direct = model == NetworkModel()
        self.calm = False
        """Nothing is lost or repeated any more."""
        self._cut: dict[str, float] = {}
        """Generators that are cut off, and until when."""

    def cut(self, name: str, seconds: float) -> None:
        self._cut[name] = self.clock.now + seconds

    def is_cut(self, name: str) -> bool:
        return bool(self._cut) and self._cut.get(name, 0.0) > self.clock.now

    def send(self, name: str, deliver: Callable[..., None], *message: Any) -> None:
        """Between the hub and this generator, either way. What is under way when the line is cut arrives."""
        if self.is_direct:
            deliver(*message)
            return
        random, model = self.random, self.model
        if self.is_cut(name) or (random.random() < model.loss and not self.calm):
            return
        self.clock.after(model.delay_s + model.jitter_s * random.random(), deliver, *message)
        if model.repeat and not self.calm and random.random() < model.repeat:
            self.clock.after(model.delay_s + 10 * model.jitter_s * random.random(), deliver, *message)
