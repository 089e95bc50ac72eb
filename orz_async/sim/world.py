"""A simulation from its parts, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from orz_async.broker.book import Book
from orz_async.broker.ledger import Ledger
from orz_async.broker.transitions import LedgerConfig
from orz_async.broker.words import waiting_line
from orz_async.errors import OrzError
from orz_async.sim.clock import Clock
from orz_async.sim.faults import Faults
from orz_async.sim.generator import Generator
from orz_async.sim.history import History
from orz_async.sim.hub import Hub, MakeLedger, Tasks
from orz_async.sim.learner import Learner
from orz_async.sim.models import EngineModel, FaultModel, LearnerModel, NetworkModel
from orz_async.sim.network import Network
from orz_async.sim.oracle import Oracle, Violation


def real_ledger(config: LedgerConfig, prompt_id: Callable[[int], str], book: Book | None) -> Ledger:
    return Ledger(config, prompt_id, book)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that decides a simulation."""

    seed: int
    ledger: LedgerConfig
    generators: int
    engine: EngineModel
    learner: LearnerModel
    network: NetworkModel = field(default_factory=NetworkModel)
    faults: FaultModel = field(default_factory=FaultModel)
    prompt_tokens: float = 0.0
    """Mean."""
    eval_every: int = 0
    fsync_s: float = 0.0
    """Period in which the journal becomes durable; 0: no journal, for runs without restarts."""
    limit_s: float = float("inf")
    """A run that has not ended by then hangs."""
    hashed: bool = True
    status_s: float = 0.0
    """Period of the generators' Status where nothing gets lost and it only costs time; 0: the ledger's heartbeat_s."""
    stop_after: int = 0
    """End after so many learner steps, with rollouts in flight; 0: after the last one."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Sums over all generators at the end of a learner step."""

    generator_s: float
    waits: dict[str, float]
    """Idle seconds by cause."""
    tokens: float
    """Sampled."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one simulation came to. All figures are simulated."""

    violation: str
    hash: str
    seconds: float
    events: int
    step_ends: list[float]
    """Of the learner's last life."""
    step_waits: list[float]
    lag_tokens: Counter[int]
    ended: Counter[str]
    faults: Counter[str]
    restarts: int
    lengths: list[int]
    """Of the trained rollouts, in the order of training."""
    marks: list[Mark]


class World:
    def __init__(self, scenario: Scenario, tasks: Tasks, make_ledger: MakeLedger = real_ledger) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.random = Random(scenario.seed)
        self.oracle = Oracle(scenario.ledger, remember=bool(scenario.fsync_s))
        self.history = History() if scenario.hashed else None
        self.network = Network(scenario.network, self.clock, self.random)
        self.hub = Hub(
            scenario.ledger,
            make_ledger,
            tasks,
            clock=self.clock,
            network=self.network,
            oracle=self.oracle,
            history=self.history,
            fsync_s=scenario.fsync_s,
            eval_every=scenario.eval_every,
            keepalive=not self.network.is_direct,
        )
        self.faults = Faults(scenario.faults, self.clock, self.random, self.hub, self.network, self)
        self.all_generators: list[Generator] = []
        self.marks: list[Mark] = []

    def run(self) -> Outcome:
        try:
            self._run()
            violation = ""
        except Violation as broken:
            violation = str(broken)
        except (AssertionError, LookupError, ValueError, OrzError) as error:
            # The ledger's own checks: what they find is a finding, whichever statement found it.
            violation = f"the ledger raised {type(error).__name__}: {error}"
        return self._outcome(violation)

    def _run(self) -> None:
        self.hub.learner = self._new_learner(0)
        self.hub.begin()
        self.hub.learner.begin()
        for _ in range(self.scenario.generators):
            self.spawn()
        self.faults.begin()
        self.clock.run(self.scenario.limit_s)
        if not self._is_done():
            raise Violation(f"no end after {self.clock.now:.0f} virtual seconds: {self._awaited()}")
        if not self.scenario.stop_after:
            self.oracle.finished(self.hub.ledger.book)

    def _is_done(self) -> bool:
        learner = self.hub.learner
        if learner is not None and self.scenario.stop_after:
            return len(learner.step_ends) >= self.scenario.stop_after
        return learner is not None and learner.done

    def _awaited(self) -> str:
        return "no learner" if self.hub.learner is None else waiting_line(self.hub.ledger, self.clock.now)

    # Processes.

    def spawn(self, name: str = "") -> None:
        name = name or f"g{len(self.all_generators)}"
        old = self.hub.generators.get(name)
        if old is not None and old.alive:
            return
        generator = Generator(
            name,
            pid=len(self.all_generators),
            model=self.scenario.engine,
            clock=self.clock,
            network=self.network,
            hub=self.hub,
            heartbeat_s=self.scenario.status_s or self.scenario.ledger.heartbeat_s,
            prompt_tokens=self.scenario.prompt_tokens,
            quiet=self.network.is_direct,
        )
        self.all_generators.append(generator)
        self.hub.generators[name] = generator
        generator.begin()

    def restart_learner(self, damaged: bool) -> None:
        self.hub.recover(self._new_learner, damaged=damaged)

    def _new_learner(self, version: int) -> Learner:
        return Learner(
            self.scenario.learner,
            self.clock,
            self.hub,
            version=version,
            steps=self.scenario.ledger.total_steps,
            prompt_tokens=self.scenario.prompt_tokens,
            on_step=self._step_ended,
        )

    def _step_ended(self) -> None:
        if self.scenario.stop_after:
            self._mark()
        if self._is_done():
            self.clock.stop()

    def _mark(self) -> None:
        waits: Counter[str] = Counter()
        tokens = 0.0
        for generator in self.all_generators:
            generator.settle()
            waits.update(generator.waits)
            tokens += generator.engine.tokens
        self.marks.append(Mark(self.clock.now * len(self.all_generators), dict(waits), tokens))

    def _outcome(self, violation: str) -> Outcome:
        learner = self.hub.learner
        return Outcome(
            violation=violation,
            hash=self.history.hash() if self.history else "",
            seconds=self.clock.now,
            events=self.history.events if self.history else 0,
            step_ends=learner.step_ends if learner else [],
            step_waits=learner.step_waits if learner else [],
            lag_tokens=self.oracle.lag_tokens,
            ended=self.oracle.ended,
            faults=self.faults.counts,
            restarts=self.oracle.restarts,
            lengths=self.oracle.trained_lengths,
            marks=self.marks,
        )
