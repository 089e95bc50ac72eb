"""A generator daemon as the hub sees it: what `generator/daemon.py` and `workload.py` do, without tokens and sockets.

Modelled: joining and joining again after silence, leases that wait for their weights, results kept until Ack or Nack
and sent again, weights fetched while decoding goes on, evaluations that hold a swap back, draining, and the epoch of
the learner, which voids everything. Not modelled: grading (it runs beside the engine) and the time to load a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from orz_async.broker.messages import (
    Ack,
    Bye,
    Cancel,
    Failure,
    Hello,
    LeaseRef,
    Leave,
    Nack,
    Progress,
    Published,
    Status,
    Welcome,
)
from orz_async.records import Span
from orz_async.sim.clock import Clock
from orz_async.sim.engine import Engine, Sequence, Work
from orz_async.sim.models import EngineModel
from orz_async.sim.network import Network

RESEND_S = 5.0
SILENCE_S = 3.0
"""Without a word from the hub for this long it says Hello again."""
EVAL_PIN_S = 10.0


class HubSide(Protocol):
    """Where this generator's messages go, and what it is lent."""

    def receive(self, name: str, epoch: int, message: Any) -> None: ...
    def length_of(self, work: Work) -> int: ...
    def fails(self, work: Work) -> str: ...
    def result(self, name: str, work: Work, length: int, spans: tuple[Span, ...], seconds: float) -> Any: ...


class Generator:
    def __init__(
        self,
        name: str,
        pid: int,
        model: EngineModel,
        *,
        clock: Clock,
        network: Network,
        hub: HubSide,
        heartbeat_s: float,
        prompt_tokens: float,
        quiet: bool,
    ) -> None:
        """`quiet`: nothing gets lost, so results are not repeated and silence means nothing."""
        self.name = name
        self.pid = pid
        self.model = model
        self.clock = clock
        self.network = network
        self.hub = hub
        self.heartbeat_s = heartbeat_s
        self.quiet = quiet
        self.slots = model.slots + model.queue
        self.alive = True
        self.frozen_until = -1.0
        self.epoch = -1
        self.wanted = -1
        self.engine = Engine(model, clock, prompt_tokens, self._done)
        self.early: dict[LeaseRef, Work] = {}
        """Leases whose floor the engine does not serve yet."""
        self.results: dict[LeaseRef, tuple[Any, float]] = {}
        """Results without an answer, and when they were last sent."""
        self.corrupt: Callable[[Any], Any] | None = None
        """What garbage this generator makes of its results, while it does."""
        self.waits = {"leases": 0.0, "weights": 0.0}
        """Idle seconds by cause."""
        self._idle_since = clock.now
        self._evals = 0
        self._fetched = -1
        self._pinned_since: float | None = None
        self._heard = clock.now
        self._status_due = clock.now

    def begin(self) -> None:
        self._hello()
        self.clock.after(self.heartbeat_s, self._beat)

    # What the hub says.

    def receive(self, epoch: int, message: Any) -> None:
        if not self.alive:
            return
        if self.frozen_until > self.clock.now:
            # The kernel keeps it until the process runs again.
            self.clock.at(self.frozen_until, self.receive, epoch, message)
            return
        if epoch < self.epoch:
            return
        self._heard = self.clock.now
        if isinstance(message, Welcome):
            self._welcome(epoch, message)
        elif epoch != self.epoch:
            self._hello()  # a new learner that does not know us
        elif isinstance(message, Published):
            self._want(message.version)
        elif isinstance(message, Ack | Nack):
            self._forget(message.lease)
        elif isinstance(message, Cancel):
            for ref in message.leases:
                self._forget(ref)
        elif isinstance(message, Bye):
            self._void()
            self._hello()

    def lend(self, epoch: int, leases: tuple[Work, ...], refs: tuple[LeaseRef, ...]) -> None:
        """A Grant."""
        if not self.alive:
            return
        if self.frozen_until > self.clock.now:
            self.clock.at(self.frozen_until, self.lend, epoch, leases, refs)
            return
        if epoch != self.epoch:
            return
        self._heard = self.clock.now
        self._account()
        for work, ref in zip(leases, refs, strict=True):
            if not self.slots:
                self._send(Failure(ref, "the generator drains", returned=True))
            elif ref in self.results:
                self._send_result(ref)
            elif ref not in self.engine.held and ref not in self.early:
                self._evals += work.kind == "eval"
                if work.version_floor <= self.engine.version:
                    self._start(work, ref)
                else:
                    self.early[ref] = work

    # What it does.

    def freeze(self, seconds: float) -> None:
        """SIGSTOP and SIGCONT."""
        self.frozen_until = self.clock.now + seconds
        self.engine.freeze(self.frozen_until)

    def kill(self) -> None:
        self._account()
        self.alive = False
        self.engine.stop()

    def drain(self) -> None:
        """SIGTERM: hand everything back that has no token, then go."""
        self.slots = 0
        queued = [ref for ref, s in self.engine.held.items() if s.start < 0]
        for ref in (*queued, *self.early):
            self._forget(ref)
            self._send(Failure(ref, "the generator drains", returned=True))
        self._send_status()

    def fail(self, ref: LeaseRef, reason: str) -> None:
        """The engine could not finish this lease."""
        self._forget(ref)
        self._send(Failure(ref, reason, returned=False))

    def settle(self) -> None:
        """Book the time until now."""
        self._account()

    def leave(self) -> None:
        self._send(Leave("drained"))
        self.kill()

    @property
    def held(self) -> int:
        return len(self.engine.held) + len(self.early) + len(self.results)

    def _hello(self) -> None:
        self._send(Hello(self.name, "simulated", self.slots, 0, self.pid))

    def _welcome(self, epoch: int, welcome: Welcome) -> None:
        if epoch != self.epoch:
            self._void()
            self.epoch, self.wanted, self._fetched = epoch, -1, -1
            self.engine.version = -1
        else:
            for ref in list(self.results):
                self._send_result(ref)
        self._want(welcome.version)
        self._send_status()

    def _void(self) -> None:
        self._account()
        for ref in list(self.engine.held):
            self.engine.cancel(ref)
        self.early.clear()
        self.results.clear()
        self._evals = 0

    def _want(self, version: int) -> None:
        if version > self.wanted:
            self._account()
            self.wanted = version
            if self.model.fetch_s:
                self.clock.after(self.model.fetch_s, self._arrived, self.epoch, version)
            else:
                self._arrived(self.epoch, version)

    def _arrived(self, epoch: int, version: int) -> None:
        if not self.alive or epoch != self.epoch or version <= self._fetched:
            return
        self._fetched = version
        if self._evals and self.engine.version >= 0 and self._pinned_since is None:
            self._pinned_since = self.clock.now
            self.clock.after(EVAL_PIN_S, self._swap)
        if self._pinned_since is None:
            self._swap()

    def _swap(self) -> None:
        self._pinned_since = None
        if not self.alive or self._fetched <= self.engine.version:
            return
        if self.frozen_until > self.clock.now:
            self.clock.at(self.frozen_until, self._swap)
            return
        self._account()
        self.engine.swap(self._fetched)
        ready = [(ref, work) for ref, work in self.early.items() if work.version_floor <= self.engine.version]
        for ref, work in ready:
            del self.early[ref]
            self._start(work, ref)
        self._send_status()

    def _start(self, work: Work, ref: LeaseRef) -> None:
        if reason := self.hub.fails(work):
            self._count_eval(ref)
            self._send(Failure(ref, reason, returned=False))
        else:
            self.engine.submit(work, ref, self.hub.length_of(work))

    def _done(self, sequence: Sequence, spans: tuple[Span, ...]) -> None:
        if not self.alive:
            return
        self._account(was_busy=True)
        result = self.hub.result(
            self.name, sequence.work, sequence.length, spans, max(0.0, self.clock.now - sequence.began)
        )
        if self.corrupt is not None:
            result = self.corrupt(result)
        self.results[sequence.ref] = (result, self.clock.now)
        self._send_result(sequence.ref)
        if not self.slots and not self.held:
            self.leave()

    def _send_result(self, ref: LeaseRef) -> None:
        result, _ = self.results[ref]
        self.results[ref] = (result, self.clock.now)
        self._send(result)

    def _forget(self, ref: LeaseRef) -> None:
        self._account()
        known = self.results.pop(ref, None) or self.early.pop(ref, None) or self.engine.held.get(ref)
        if known is None:
            return
        self.engine.cancel(ref)
        self._count_eval(ref)

    def _count_eval(self, ref: LeaseRef) -> None:
        if ref.kind == "eval":
            self._evals -= 1
            if not self._evals and self._pinned_since is not None:
                self._swap()

    def _beat(self) -> None:
        if not self.alive:
            return
        if self.frozen_until > self.clock.now:
            self.clock.at(self.frozen_until, self._beat)
            return
        now = self.clock.now
        if now < self._status_due:
            self.clock.at(self._status_due, self._beat)  # one was sent since, out of turn
            return
        if not self.quiet:
            if now - self._heard > SILENCE_S:
                self._heard = now
                self._hello()
            for ref, (_, sent_at) in list(self.results.items()):
                if now - sent_at >= RESEND_S:
                    self._send_result(ref)
        self._send_status()
        if not self.slots and not self.held:
            self.leave()
        self.clock.at(self._status_due, self._beat)

    def _send_status(self) -> None:
        self._status_due = self.clock.now + self.heartbeat_s
        if self.epoch < 0:
            return
        progress = [Progress(ref, 0, queued=True) for ref in self.early]
        for ref, sequence in self.engine.held.items():
            tokens = self.engine.progress(sequence)
            progress.append(Progress(ref, max(0, tokens), queued=tokens < 0))
        progress += [Progress(ref, 1 << 30, queued=False) for ref in self.results]
        self._send(Status(self.slots, self.engine.version, tuple(progress)))

    def _send(self, message: Any) -> None:
        self.network.send(self.name, self.hub.receive, self.name, self.epoch, message)

    def _account(self, was_busy: bool = False) -> None:
        """Book the idle time since the last change; called before whatever may end it."""
        now = self.clock.now
        if not was_busy and not self.engine.rows:
            cause = "weights" if self.wanted > self.engine.version and self.engine.version >= 0 else "leases"
            self.waits[cause] += now - self._idle_since
        self._idle_since = now
