"""What goes wrong, when, and for how long: all drawn from one seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Protocol

from orz_async.broker.messages import Failure, LeaseRef, Progress, Status
from orz_async.sim.clock import Clock
from orz_async.sim.generator import Generator
from orz_async.sim.hub import Hub
from orz_async.sim.models import Fault, FaultModel
from orz_async.sim.network import Network
from orz_async.sim.tasks import corrupted, made_up

MOST_GENERATORS = 8


class Crew(Protocol):
    """Whoever starts processes."""

    def spawn(self, name: str = "") -> None: ...
    def restart_learner(self, damaged: bool) -> None: ...


class Faults:
    """Strikes until `model.until_s`; everything it broke comes back by itself."""

    def __init__(self, model: FaultModel, clock: Clock, random: Random, hub: Hub, network: Network, crew: Crew) -> None:
        self.model = model
        self.clock = clock
        self.random = random
        self.hub = hub
        self.network = network
        self.crew = crew
        self.counts: Counter[str] = Counter()
        self._kinds = list(model.weights)
        self._weights = list(model.weights.values())
        self._strike: dict[Fault, Callable[[], bool]] = {
            "kill_generator": self._kill_generator,
            "freeze_generator": self._freeze_generator,
            "slow_generator": self._slow_generator,
            "garbage": self._garbage,
            "engine_failure": self._engine_failure,
            "drain": self._drain,
            "join": self._join,
            "partition": self._partition,
            "kill_learner": lambda: self._kill_learner(power=False),
            "cut_power": lambda: self._kill_learner(power=True),
            "freeze_learner": self._freeze_learner,
        }

    def begin(self) -> None:
        if self.model.every_s:
            self.clock.after(self.random.expovariate(1 / self.model.every_s), self._next)

    def _next(self) -> None:
        if self.clock.now >= self.model.until_s:
            self.network.calm = True
            return
        kind = self.random.choices(self._kinds, self._weights)[0]
        self.counts[kind] += self._strike[kind]()
        self.begin()

    def _victim(self) -> Generator | None:
        alive = [g for g in self.hub.generators.values() if g.alive and g.slots]
        return self.random.choice(alive) if alive else None

    def _kill_generator(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        victim.kill()
        self._maybe_noticed(victim)
        back_s = self.random.uniform(*self.model.generator_back_s)
        self.clock.after(back_s, self.crew.spawn, self.random.choice(("", victim.name)))
        return True

    def _maybe_noticed(self, victim: Generator) -> None:
        if self.random.random() < 0.5:
            self.clock.after(0.1, self.hub.unreachable, victim.name)

    def _freeze_generator(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        beat, lease = self.hub.config.heartbeat_s, self.hub.config.lease_s
        victim.freeze(self.random.choice((beat, 10 * beat, 1.5 * lease, 4 * lease, 20 * lease)))
        return True

    def _slow_generator(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        victim.engine.slow(self.random.uniform(3, 30))
        self.clock.after(self.random.uniform(1, 10), victim.engine.slow, 1.0)
        return True

    def _garbage(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        victim.corrupt = lambda result: corrupted(result, self.random)
        self.clock.after(self.random.uniform(0.5, 4), setattr, victim, "corrupt", None)
        for message in self._nonsense(victim):
            self.network.send(victim.name, self.hub.receive, victim.name, victim.epoch, message)
        return True

    def _nonsense(self, victim: Generator) -> list[object]:
        """Messages about leases that are somebody else's, long gone, or nobody's."""
        random, ledger = self.random, self.hub.ledger
        number = random.choice((-1, 0, random.randrange(10), 10**12))
        stray = LeaseRef(random.choice(("train", "eval")), number, random.choice((0, 1, 2)))
        others = [r.ref for peer in ledger.peers.values() for r in peer.held.values() if peer.name != victim.name]
        foreign = random.choice(others) if others else stray
        claims = tuple(Progress(ref, random.choice((0, 10**6)), queued=False) for ref in (stray, foreign, stray))
        return [
            made_up(foreign, victim.name),
            made_up(stray, victim.name),
            Failure(foreign, "nonsense", returned=random.random() < 0.5),
            Status(random.choice((0, victim.slots)), random.choice((-1, 10**9)), claims),
        ]

    def _engine_failure(self) -> bool:
        victim = self._victim()
        if victim is None or not victim.engine.held or victim.frozen_until > self.clock.now:
            return False
        ref = self.random.choice(list(victim.engine.held))
        victim.fail(ref, "the engine broke")
        return True

    def _drain(self) -> bool:
        victim = self._victim()
        if victim is None or victim.frozen_until > self.clock.now:
            return False
        victim.drain()
        self.clock.after(self.random.uniform(*self.model.generator_back_s), self.crew.spawn)
        return True

    def _join(self) -> bool:
        if sum(g.alive for g in self.hub.generators.values()) >= MOST_GENERATORS:
            return False
        self.crew.spawn()
        return True

    def _partition(self) -> bool:
        seconds = self.random.choice((0.5, 3.0, 2 * self.hub.config.lease_s))
        victim = self._victim()
        whole = self.random.random() < 0.25
        for generator in list(self.hub.generators.values()):
            if whole or generator is victim:
                self.network.cut(generator.name, seconds)
                self._maybe_noticed(generator)
        return True

    def _kill_learner(self, *, power: bool) -> bool:
        if self.hub.learner is None:
            return False
        self.hub.die(power=power)
        damaged = self.random.random() < self.model.damaged
        self.clock.after(self.random.uniform(*self.model.learner_back_s), self.crew.restart_learner, damaged)
        return True

    def _freeze_learner(self) -> bool:
        if self.hub.learner is None:
            return False
        self.hub.frozen_until = self.clock.now + self.random.choice((0.5, 2.0, 1.5 * self.hub.config.lease_s))
        return True
