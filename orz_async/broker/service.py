"""The broker's thread: what the ledger decides becomes frames, batches and events, and time passes for it.

ROUTER ──frames──► reception ──events──► ledger.handle ──actions──► frames, batches, event log
inbox  ──calls of the learner──events──►      ▲
clock  ─────────────────────────Tick──────────┘
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import zmq

from orz_async.broker import frontier
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Bye, GeneratorState, Nack, Report
from orz_async.broker.outbox import Outbox
from orz_async.broker.reception import Received, Reception
from orz_async.broker.recovery import Snapshot
from orz_async.broker.shelf import Shelf
from orz_async.broker.switchboard import Switchboard
from orz_async.broker.transitions import (
    Accepted,
    Action,
    Ended,
    Evaluate,
    Evaluated,
    Event,
    Granted,
    PeerGone,
    Publish,
    Resend,
    Send,
    Take,
    Taken,
    Tick,
    Unreachable,
)
from orz_async.broker.words import waiting_line
from orz_async.observe.events import EventLog
from orz_async.records import Trajectory

log = logging.getLogger(__name__)

_FRAMES_A_TURN = 256
"""So that a flood of frames delays a call of the learner by some milliseconds at most."""
_NACKS_REPORTED = 100
"""Of one generator."""
_LEFT_REMEMBERED = 1000
_REPORT_S = 0.1
_GENERATORS_REPORTED = 4096
_WAITING_S = 1.0
"""A batch that is late by this much is reported, again and again, for the live view."""
_LOGGED_S = 30.0
"""The same in the process's log."""
_GOODBYE_S = 2.0
"""Generators have so long to hang up at the end."""


class Service:
    """Consumes frames and calls, produces frames and batches; waits in one poll; ends when `stop` is called."""

    def __init__(
        self,
        ledger: Ledger,
        switchboard: Switchboard,
        reception: Reception,
        outbox: Outbox,
        shelf: Shelf,
        events: EventLog,
    ) -> None:
        self.ledger = ledger
        self.switchboard = switchboard
        self.outbox = outbox
        self.journal = outbox.journal
        self.shelf = shelf
        self.reception = reception
        self.events = events
        self.announced = -1
        """The newest version that generators know of."""
        self.last_progress = time.monotonic()
        """Read by the learner's thread while it waits."""
        self.evaluations: dict[int, list[Trajectory]] = {}
        """Accepted results of evaluations, by version."""
        self.inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._taken: Taken | None = None
        """Decided, and delivered as soon as it is written down."""
        self._answering: Future[Any] | None = None
        self._delivery: Future[list[Trajectory]] | None = None
        self._evaluation: Future[list[Trajectory]] | None = None
        self._expected_version = -1
        self._incoming: Received | None = None
        """The result that the ledger is judging."""
        self._num_granted: Counter[str] = Counter()
        """Leases granted since the last publication, by generator."""
        self._oldest_records: dict[int, int] = {}
        """By version of a snapshot: the oldest journal record that it needs."""
        self._num_nacks: Counter[str] = Counter()
        self._left_at: dict[str, float] = {}
        self._report: Report | None = None
        self._reported = 0.0
        self._wait_reported = self._wait_logged = 0.0
        self._stopping = False
        self._heartbeat_s = ledger.config.heartbeat_s

    def run(self, wakeup: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(self.switchboard.socket, zmq.POLLIN)
        poller.register(wakeup, zmq.POLLIN)
        gate = self.switchboard.gate
        if gate is not None:
            poller.register(gate.socket, zmq.POLLIN)
        tick_s = self._heartbeat_s / 2
        next_tick = time.monotonic() + tick_s
        while not self._stopping:
            ready = dict(poller.poll(max(0, math.ceil((next_tick - time.monotonic()) * 1000))))
            if wakeup in ready:
                wakeup.recv()
                self._answer_calls()
            if gate is not None and gate.socket in ready:
                gate.answer()
            if self.switchboard.socket in ready:
                self._receive()
            if (now := time.monotonic()) >= next_tick:
                self._tick(now)
                next_tick = now + tick_s
            while self.switchboard.broken:
                self.apply(Unreachable(self.switchboard.broken.pop()))
            self.outbox.flush(now)
            self._deliver()

    def apply(self, event: Event, result: Received | None = None) -> None:
        """One event through the ledger, and what follows from it."""
        self._incoming = result
        now = time.monotonic()
        for action in self.ledger.handle(event, now):
            self._act(action, now)

    # The three sources of events.

    def _answer_calls(self) -> None:
        while not self.inbox.empty():
            function, self._answering = self.inbox.get()
            self._answering.set_result(function())

    def _receive(self) -> None:
        now = time.monotonic()
        for arrived in self.switchboard.arrived(_FRAMES_A_TURN):
            if self.reception.receive(arrived, self, now):
                self.last_progress = now
            self.journal.ease()

    def _tick(self, now: float) -> None:
        self.apply(Tick())
        self.reception.sweep(self)
        if self.ledger.wanted is not None:
            self._report_wait(now)
        quiet = [c.name for c in self.switchboard.by_name.values() if now - c.sent >= 0.9 * self._heartbeat_s]
        announcements = self.reception.routes.announcements() if quiet else {}
        for name in quiet:
            self.switchboard.send(name, announcements[name], now)

    def _report_wait(self, now: float) -> None:
        """One line says what the learner waits for, from whom, since when."""
        if now - self.last_progress < _WAITING_S or now - self._wait_reported < _WAITING_S:
            return
        self._wait_reported = now
        line = self.waiting_for()
        self.events.emit("waiting", text=line)
        if now - max(self.last_progress, self._wait_logged) >= _LOGGED_S:
            self._wait_logged = now
            log.warning(line)

    # What the ledger decided.

    def _act(self, action: Action, now: float) -> None:
        match action:
            case Send():
                self.outbox.say(action.generator, action.message)
                if isinstance(action.message, Nack):
                    self._report_nack(action.generator, action.message)
            case Accepted():
                self._store(action)
            case Granted():
                self._grant(action)
            case Resend():
                self.outbox.lend(action.generator, action.terms)
            case Ended():
                self._end(action)
            case Taken():
                self.journal.append(action)
                self._taken = action
            case PeerGone():
                self._report_left(action, now)
            case Evaluated():
                self._deliver_evaluation(action.version)

    def _report_left(self, gone: PeerGone, now: float) -> None:
        """Unless the same one left just now: comings and goings must not fill the disk."""
        if now - self._left_at.get(gone.generator, -math.inf) >= self._heartbeat_s:
            if len(self._left_at) >= _LEFT_REMEMBERED:
                self._left_at.clear()
            self._left_at[gone.generator] = now
            self.events.emit("left", generator=gone.generator, reason=gone.reason)

    def _report_nack(self, generator: str, nack: Nack) -> None:
        self._num_nacks[generator] += 1
        # A hostile generator must not be able to fill the disk through the event log.
        if self._num_nacks[generator] <= _NACKS_REPORTED:
            self.events.emit("nack", generator=generator, lease=nack.lease, reason=nack.reason)

    def _grant(self, granted: Granted) -> None:
        train = tuple(terms for terms in granted.terms if terms.kind == "train")
        if train:
            self.journal.append(Granted(granted.generator, train))
            self._num_granted[granted.generator] += len(train)
        self.outbox.lend(granted.generator, granted.terms)

    def _store(self, accepted: Accepted) -> None:
        assert self._incoming is not None
        trajectory, encoded = self._incoming
        index = self.journal.append(trajectory, encoded) - 1
        if trajectory.kind == "eval":
            version = self.ledger.evals.version_of(trajectory.rollout)
            self.evaluations.setdefault(version, []).append(trajectory)
        else:
            self.shelf.put(trajectory, index)

    def _end(self, ended: Ended) -> None:
        if ended.lease.kind == "train":
            self.journal.append(ended)
        self.reception.wasted(ended.generator, time.monotonic())
        self.events.emit("expired", lease=ended.lease, generator=ended.generator, cause=ended.cause)
        if ended.quarantined:
            self.events.emit("quarantined", lease=ended.lease, reason=ended.quarantined)

    def _deliver(self) -> None:
        """Hand over the batch that was taken, now that the journal has it."""
        if self._taken is not None and self._delivery is not None:
            batch = [self.shelf.take(number) for number in self._taken.rollouts]
            self._taken, delivery, self._delivery = None, self._delivery, None
            delivery.set_result(batch)

    # Calls of the learner, run in this thread.

    def take(self, step: int) -> Future[list[Trajectory]]:
        delivery: Future[list[Trajectory]] = Future()
        self._delivery = delivery
        self.last_progress = time.monotonic()
        self.apply(Take(step))
        return delivery

    def publish(self, version: int, digest: str = "") -> None:
        self.announced = version
        self.reception.routes.publish(version, digest)
        now = time.monotonic()
        for name, announcement in self.reception.routes.announcements().items():
            self.switchboard.send(name, announcement, now)
        if self._num_granted:
            self.events.emit("granted", version=version, generators=dict(self._num_granted))
            self._num_granted.clear()
        self.shelf.release(self.ledger.book.taken)
        self.apply(Publish(version))
        self.report_funnel()

    def evaluate(self, version: int) -> None:
        self.apply(Evaluate(version))

    def tighten(self, by: int) -> None:
        self.ledger.book.tighten(by)

    def evaluation_complete(self, version: int) -> bool:
        return self.ledger.evals.complete(version)

    def expect_evaluation(self, version: int) -> Future[list[Trajectory]]:
        expected: Future[list[Trajectory]] = Future()
        self._evaluation = expected
        self._expected_version = version
        self._deliver_evaluation(version)
        return expected

    def _deliver_evaluation(self, version: int) -> None:
        if self._evaluation is None or self._expected_version != version or not self.ledger.evals.complete(version):
            return
        results = self.evaluations.pop(version, [])
        self._evaluation.set_result(sorted(results, key=lambda trajectory: trajectory.rollout))
        self._evaluation = None

    def evaluation_line(self, version: int) -> str:
        done = len(self.evaluations.get(version, []))
        size = self.ledger.config.eval_rollouts
        return f"{done} of {size} rollouts; generators: {', '.join(sorted(self.switchboard.by_name)) or 'none'}"

    def waiting_for(self) -> str:
        return waiting_line(self.ledger, time.monotonic() - self.last_progress)

    def generators(self) -> list[dict[str, object]]:
        now = time.monotonic()
        peers = self.ledger.peers
        return [
            {
                "name": c.name,
                "engine": c.hello.engine,
                "slots": peers[c.name].slots if c.name in peers else 0,
                "version": peers[c.name].version if c.name in peers else -1,
                "outstanding": len(peers[c.name].held) if c.name in peers else 0,
                "tokens_s": c.rate(now),
                "silent_s": now - c.heard,
            }
            for c in self.switchboard.by_identity.values()
        ]

    def report(self) -> Report:
        """For observers; the same one for a tenth of a second, however many ask."""
        now = time.monotonic()
        if self._report is None or now - self._reported >= _REPORT_S:
            counts = self.ledger.book.counts
            self._reported = now
            self._report = Report(
                run_id=self.reception.welcome.run_id,
                version=self.announced,
                waiting_for=self.waiting_for(),
                granted=counts.granted,
                trained=counts.trained,
                quarantined=counts.quarantined,
                in_flight=counts.in_flight,
                expired=dict(counts.expired),
                generators=tuple(GeneratorState(**line) for line in self.generators()[:_GENERATORS_REPORTED]),  # type: ignore[arg-type]
            )
        return self._report

    def report_funnel(self) -> None:
        self.events.emit("funnel", **self.ledger.book.counts.funnel())

    def snapshot(self) -> bytes:
        self.journal.write(time.monotonic())
        # A checkpoint must not know of records that a power cut can take away.
        self.journal.sync()
        book = self.ledger.book
        oldest = self.shelf.oldest_record(self.journal.next_index)
        self._oldest_records[book.version] = oldest
        return msgspec.msgpack.encode(Snapshot(frontier.save(book), self.journal.next_index, oldest))

    def checkpointed(self, oldest_version: int) -> None:
        self._oldest_records = {v: index for v, index in self._oldest_records.items() if v >= oldest_version}
        if oldest_version in self._oldest_records:
            self.journal.keep_from(self._oldest_records[oldest_version])

    def stop(self, finished: bool, reason: str) -> None:
        self.outbox.finish(time.monotonic())
        self.switchboard.say_goodbye(Bye(reason, finished), _GOODBYE_S)
        self.report_funnel()
        self._stopping = True

    def fail(self, error: BaseException) -> None:
        """Whoever waits for this thread must not wait for ever."""
        for waiting in (self._answering, self._delivery, self._evaluation):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
        while not self.inbox.empty():
            _, answer = self.inbox.get()
            answer.set_exception(error)
