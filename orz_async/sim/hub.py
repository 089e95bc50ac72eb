"""The broker in virtual time: what `broker/service.py` and `reception.py` do around the ledger, with calls for sockets
and a list for the journal.

First on paper, then in the world: entries are journaled before anything is sent, and acknowledgements are held back
until their entry is durable. A killed process loses nothing that was written; a power cut loses what was not durable.
Not modelled: frames and their limits, penalties and keys (the wire has tests of its own), the size of the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from orz_async.broker import frontier
from orz_async.broker.book import Book
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Ack, Failure, Hello, LeaseRef, Leave, Published, Status, Welcome
from orz_async.broker.rollouts import State
from orz_async.broker.transitions import (
    Accepted,
    Ended,
    Entry,
    Evaluate,
    Event,
    Failed,
    Finished,
    Granted,
    Heartbeat,
    Joined,
    LedgerConfig,
    Left,
    Publish,
    Resend,
    Restarted,
    Send,
    Take,
    Taken,
    Terms,
    Tick,
    Unreachable,
)
from orz_async.records import Span
from orz_async.sim.clock import Clock
from orz_async.sim.engine import Work
from orz_async.sim.generator import Generator
from orz_async.sim.history import History
from orz_async.sim.learner import Learner
from orz_async.sim.network import Network
from orz_async.sim.oracle import Oracle

MakeLedger = Callable[[LedgerConfig, Callable[[int], str], Book | None], Ledger]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished rollout on its way. `content` is a Trajectory where the simulation makes them."""

    ref: LeaseRef
    length: int
    spans: tuple[Span, ...]
    content: Any = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    book: bytes
    position: int
    """Entries of the journal before this one are in the book."""
    version: int


class Tasks(Protocol):
    """The contents of leases and results, as far as a simulation has any."""

    def prompt_id(self, index: int) -> str: ...
    def leases(self, terms: tuple[Terms, ...]) -> tuple[Work, ...]: ...
    def length_of(self, work: Work) -> int: ...
    def fails(self, work: Work) -> str: ...
    def result(self, name: str, work: Work, length: int, spans: tuple[Span, ...], seconds: float) -> Result: ...
    def problem(self, name: str, result: Result, terms: Terms, published: int) -> str | None: ...


class Hub:
    """One broker over all its lives. `ledger`, `learner` and `epoch` change with each."""

    def __init__(
        self,
        config: LedgerConfig,
        make_ledger: MakeLedger,
        tasks: Tasks,
        *,
        clock: Clock,
        network: Network,
        oracle: Oracle,
        history: History | None,
        fsync_s: float,
        eval_every: int,
        keepalive: bool,
    ) -> None:
        self.config = config
        self.tasks = tasks
        self.clock = clock
        self.network = network
        self.oracle = oracle
        self.history = history
        self.fsync_s = fsync_s
        self.eval_every = eval_every
        self.keepalive = keepalive
        self.epoch = 0
        self.generators: dict[str, Generator] = {}
        self.learner: Learner | None = None
        self.frozen_until = -1.0
        self.announced = 0
        self.length_of = tasks.length_of
        self.fails = tasks.fails
        self.result = tasks.result
        self._make_ledger = make_ledger
        self.ledger = make_ledger(config, tasks.prompt_id, None)
        self.journal: list[Entry] = []
        self.durable = 0
        self.checkpoints = [Checkpoint(frontier.save(self.ledger.book), 0, 0)]
        self.shelf: dict[int, tuple[int, tuple[Span, ...]]] = {}
        """Length and spans of accepted rollouts that are not trained."""
        self.disk: dict[int, tuple[int, tuple[Span, ...]]] = {}
        """The same of all that were ever journaled."""
        self._unacked: list[tuple[int, str, Ack]] = []
        self._connected: set[str] = set()
        self._tick_s = config.heartbeat_s / 2
        self._incoming: Result | None = None

    def begin(self) -> None:
        """The periodic calls, once for all lives."""
        self._tick()
        if self.fsync_s:
            self._sync()

    # Messages.

    def receive(self, name: str, epoch: int, message: Any) -> None:
        if self.frozen_until > self.clock.now:
            self.clock.at(self.frozen_until, self.receive, name, epoch, message)
            return
        kind = type(message)
        if kind is Hello:
            self._connected.add(name)
            self._send(name, Welcome("run", "", (), "", self.announced, self.config.heartbeat_s, 0))
            self.apply(Joined(name, message.slots))
            return
        # A frame of an earlier epoch, or of nobody we know, is not for us.
        if epoch != self.epoch or name not in self._connected or self.learner is None:
            return
        if name not in self.ledger.peers:
            self.apply(Joined(name, 0))
        if kind is Status:
            self.apply(Heartbeat(name, message.slots, message.version, message.progress))
        elif kind is Result:
            self._result(name, message)
        elif kind is Failure:
            self.apply(Failed(name, message.lease, message.reason, message.returned))
        elif kind is Leave:
            self.apply(Left(name, message.reason))
            self._connected.discard(name)

    def _result(self, name: str, result: Result) -> None:
        ref = result.ref
        terms = self.ledger.terms(name, ref)
        problem = None
        if terms is not None:
            book = self.ledger.book
            problem = self.tasks.problem(name, result, terms, book.version + bool(book.taken))
        version = result.spans[0].version if terms is not None and problem is None else -1
        self._incoming = result
        self.apply(Finished(name, ref, version, problem))

    def unreachable(self, name: str) -> None:
        if self.learner is not None:
            self.apply(Unreachable(name))

    # The ledger.

    def apply(self, event: Event) -> None:
        if self.learner is None:
            return
        now = self.clock.now
        actions = self.ledger.handle(event, now)
        if self.history is not None:
            self.history.add(now, event, actions)
        taken = None
        for action in actions:
            kind = type(action)
            if kind is Granted:
                self._grant(action)  # type: ignore[arg-type]
            elif kind is Send:
                self._say(action.generator, action.message)  # type: ignore[union-attr]
            elif kind is Accepted:
                self._accept(action)  # type: ignore[arg-type]
            elif kind is Ended:
                if action.lease.kind == "train":  # type: ignore[union-attr]
                    self._write(action)  # type: ignore[arg-type]
            elif kind is Taken:
                self._write(action)  # type: ignore[arg-type]
                taken = action
            elif kind is Resend:
                self._lend(action.generator, action.terms)  # type: ignore[union-attr]
        if taken is not None:
            self._deliver(taken)  # type: ignore[arg-type]

    def _write(self, entry: Entry) -> None:
        if self.fsync_s:  # otherwise nothing is ever restored: the oracle has seen it, that is all
            self.journal.append(entry)
        self.oracle.entry(entry)

    def _grant(self, granted: Granted) -> None:
        train = tuple(terms for terms in granted.terms if terms.kind == "train") if self.eval_every else granted.terms
        if train:
            self._write(Granted(granted.generator, train))
        self._lend(granted.generator, granted.terms)

    def _accept(self, accepted: Accepted) -> None:
        if accepted.lease.kind == "train":
            assert self._incoming is not None
            self._write(accepted)
            content = (self._incoming.length, self._incoming.spans)
            self.shelf[accepted.lease.rollout] = content
            if self.fsync_s:
                self.disk[accepted.lease.rollout] = content

    def _say(self, name: str, message: Any) -> None:
        if isinstance(message, Ack) and self.fsync_s:
            self._unacked.append((len(self.journal), name, message))
        else:
            self._send(name, message)

    def _send(self, name: str, message: Any) -> None:
        self.network.send(name, self.generators[name].receive, self.epoch, message)

    def _lend(self, name: str, terms: tuple[Terms, ...]) -> None:
        refs = tuple(one.ref for one in terms)
        self.network.send(name, self.generators[name].lend, self.epoch, self.tasks.leases(terms), refs)

    def _deliver(self, taken: Taken) -> None:
        assert self.learner is not None
        batch = [self.shelf[number] for number in taken.rollouts]
        self.oracle.trained(taken, batch)
        self.learner.receive(len(batch), sum(length for length, _ in batch))

    # Time.

    def _tick(self) -> None:
        now = self.clock.now
        if self.frozen_until > now:
            # What arrived meanwhile was put off to the same moment and before: it is read first, as by the real one.
            self.clock.at(self.frozen_until, self._tick)
            return
        self.apply(Tick())
        if self.keepalive and self.learner is not None:
            for name in sorted(self._connected):
                self._send(name, Published(self.announced))
        self.clock.after(self._tick_s, self._tick)

    def _sync(self) -> None:
        """The journal becomes durable up to here, and what waited for that is said."""
        self.durable = len(self.journal)
        if self.learner is not None:
            for _, name, ack in self._unacked:
                self._send(name, ack)
            self._unacked.clear()
        self.clock.after(self.fsync_s, self._sync)

    # The learner's side.

    def take(self, step: int) -> None:
        self.apply(Take(step))

    def publish(self, version: int) -> None:
        self.announced = version
        for number in self.ledger.book.taken:
            del self.shelf[number]
        fresh = version != self.ledger.book.version or version == 0
        if self.eval_every and fresh and (version % self.eval_every == 0 or version == self.config.total_steps):
            self.apply(Evaluate(version))
        self.apply(Publish(version))
        self.oracle.published(version, self.ledger.book)
        for name in sorted(self._connected):
            self._send(name, Published(version))

    def save(self) -> None:
        """A checkpoint, which forces the journal to be durable first; two are kept."""
        if self.fsync_s:
            self.durable = len(self.journal)
            book = self.ledger.book
            self.checkpoints = [
                *self.checkpoints[-1:],
                Checkpoint(frontier.save(book), len(self.journal), book.version),
            ]

    # Death and return.

    def die(self, *, power: bool) -> None:
        """kill -9 of the learner and the broker in it; with `power` what was not durable is gone too."""
        assert self.learner is not None
        self.learner.alive = False
        self.learner = None
        self.ledger = self._make_ledger(self.config, self.tasks.prompt_id, None)
        self._connected.clear()
        self._unacked.clear()
        if power:
            del self.journal[self.durable :]

    def recover(self, make_learner: Callable[[int], Learner], *, damaged: bool) -> None:
        """Restart from the newest checkpoint, or from the one before if that is damaged."""
        if damaged and len(self.checkpoints) > 1:
            self.checkpoints.pop()
        start = self.checkpoints[-1]
        book = frontier.load(start.book, self.config, self.tasks.prompt_id)
        for entry in self.journal[start.position :]:
            frontier.replay(book, entry)
        self.epoch += 1
        self.frozen_until = -1.0
        self.oracle.restarted(self.journal, start.version)
        self._write(Restarted(self.epoch, ()))
        book.restart(())
        self.durable = len(self.journal)
        self._restock(book)
        self.ledger = self._make_ledger(self.config, self.tasks.prompt_id, book)
        self.learner = make_learner(start.version)
        self.learner.begin()

    def _restock(self, book: Book) -> None:
        """The trajectories of the journal are read again."""
        accepted = {n for n, r in book.rollouts.items() if r.state in (State.READY, State.TAKEN)}
        self.shelf = {number: self.disk[number] for number in sorted(accepted)}
