"""The ledger decides who may generate what, what counts and what is trained: `handle(event, now) -> actions`, pure.

Symbols: B rollouts per step, S the largest lag, W the window, v the version (= number of updates published; step t
trains version t and publishes t + 1). Rollout n, numbered in grant order, has the nominal step s(n) = floor(n / B).

Rules
  admission  n is granted while v >= s(n) - (S - W), to a generator that serves a version >= s(n) - (S - W), its floor.
  batch      step t takes the B oldest finished rollouts, once every n with s(n) <= t - W is among the finished.
  slots      n holds a slot from its first grant until the step that trained on it has published.
  end        n < total_steps * B, so nothing is in flight when the last step has published.

The bound: every token is trained with lag <= S.
  Before step t, tB rollouts are trained, among them all with s(n) < t - W (rule of the batch at t - 1). So at most B
  untrained ones have s(n) <= t - W, and being the oldest they are all in the batch: s(n) >= t - W for all trained at t.
  Their tokens were sampled by versions >= s(n) - (S - W) >= t - S. With W = 0 the batch is exactly tB <= n < (t+1)B.
Nothing starves: at v = t all n < (t + S - W + 1)B are admitted, (S - W + 1)B of them untrained, which is also the
  number of slots. W < S buys slack against stragglers with lag, W = S is synchronous in all but name.

The delivery promise: every attempt ends exactly once, as trained, expired (with a cause) or quarantined, and every
rollout is trained exactly once.
  Only HELD attempts can expire and only their holder can finish them; both moves leave HELD, so there is one end. A
  result that arrives after its attempt has expired is refused (fenced) even if the rollout is still wanted: taking it
  would need a second life for an attempt already counted, and it would save work only when suspicion was wrong, which
  costs one rollout per lease_s at most. A repeated result of an accepted attempt is acknowledged again.
  An attempt is named by kind, rollout and number, within one life of the learner: frames carry its epoch, and those of
  an earlier one are dropped before they get here. Numbers alone would not do, because a power cut can take back a grant
  that was sent but not yet durable, and the next life then grants the same number to somebody else.
  A batch is decided once (Taken) and written down; after a restart the steps that the lost process had taken are
  composed of the same rollouts, and the checkpoint's weights have seen none of them.
No step waits for ever: a lease needs progress to live, an expired one is lent again (to another generator first), one
  that holds up a step for much longer than the others needed is lent again too (`overtime.py`), and a prompt that
  failed max_attempts times is quarantined and its rollout samples the next prompt of the order. What step
  v waits for always has a floor <= v: s(n) <= v - W for the mandatory ones, and a batch decided before a restart was
  composed of rollouts that were admitted by version v.

Restart (`frontier.py`): a snapshot saved with a checkpoint, plus the entries since, gives a ledger in which nothing is
held, accepted trajectories are READY and decided batches stay decided. While v catches up with the steps that were
already taken, more than (S - W + 1)B slots may be in use; the bound on lag does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable

from orz_async.broker.alarms import Alarms
from orz_async.broker.book import Book
from orz_async.broker.evaluations import Evaluations
from orz_async.broker.lending import Lender
from orz_async.broker.messages import Ack, Cancel, LeaseRef, Nack
from orz_async.broker.overtime import Overtime, owner_of
from orz_async.broker.rollouts import Peer, Rollout
from orz_async.broker.transitions import (
    Accepted,
    Action,
    Ended,
    Evaluate,
    Evaluated,
    Event,
    Failed,
    Finished,
    Granted,
    Heartbeat,
    Joined,
    LedgerConfig,
    Left,
    PeerGone,
    Publish,
    Resend,
    Send,
    Take,
    Taken,
    Terms,
    Tick,
    Unreachable,
)

RESENDS = 3
"""Times a lease is sent again to a generator that keeps losing it."""


class Ledger:
    def __init__(self, config: LedgerConfig, prompt_id: Callable[[int], str], book: Book | None = None) -> None:
        self.config = config
        self.book = book if book is not None else Book(config, prompt_id)
        self.evals = Evaluations(config)
        self.peers: dict[str, Peer] = {}
        self.wanted: int | None = None
        """The step whose batch the learner waits for."""
        self.now = 0.0
        self._lender = Lender(self.book, self.evals, self.peers)
        self._overtime = Overtime(self.book, self.peers)
        self._alarms = Alarms(self.peers, config.lease_s)
        self._out: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply one event. `now` is any clock that does not go back."""
        self.now = now
        out: list[Action] = []
        self._out = out
        match event:
            case Heartbeat():
                self._heartbeat(event)
            case Finished():
                self._finished(event)
            case Tick():
                self._tick()
            case Joined():
                self._joined(event)
            case Failed():
                self._failed(event)
            case Left():
                if event.generator in self.peers:
                    self._lose_peer(self.peers[event.generator], "left", event.reason, blamed=False)
            case Unreachable():
                self._unreachable(event.generator)
            case Take():
                self._take(event.step)
            case Publish():
                self._publish(event.version)
            case Evaluate():
                self._evaluate(event.version)
        if self._lender.stirred:
            self._lend_to_all()
        return out

    def terms(self, generator: str, lease: LeaseRef) -> Terms | None:
        """What this generator holds under that name; None if it does not hold it (any longer)."""
        peer = self.peers.get(generator)
        rollout = peer.held.get((lease.kind, lease.rollout)) if peer else None
        return rollout.terms if rollout is not None and rollout.attempt == lease.attempt else None

    def curb(self, generator: str, slots: int) -> None:
        """Lend this generator no more than so many from now on, until its next heartbeat says otherwise."""
        peer = self.peers.get(generator)
        if peer is not None and slots < peer.slots:
            self._lender.resize(peer, slots)

    # Generators.

    def _joined(self, event: Joined) -> None:
        peer = self.peers.get(event.generator)
        if peer is None:
            peer = Peer(event.generator, 0, seen=self.now, patience=self.config.lease_s, grew=self.now)
            self.peers[peer.name] = peer
            self._alarms.watch_peer(peer)
        self._hear(peer)
        # Which version a reconnected generator serves is unknown until its first heartbeat; lend nothing before.
        peer.version = -1
        self._lender.resize(peer, event.slots)

    def _hear(self, peer: Peer) -> None:
        peer.seen = self.now
        peer.patience = self.config.lease_s

    def _heartbeat(self, event: Heartbeat) -> None:
        peer = self.peers[event.generator]
        self._hear(peer)
        peer.version = event.version
        self._lender.resize(peer, event.slots)
        listed = set()
        void = []
        for progress in event.progress:
            ref = progress.lease
            rollout = peer.held.get((ref.kind, ref.rollout))
            if rollout is None or rollout.attempt != ref.attempt:
                # The acknowledgement of an accepted one is under way; if it got lost the result comes again.
                if self._accepted_attempt(ref) != ref.attempt:
                    void.append(ref)
                continue
            listed.add((ref.kind, ref.rollout))
            rollout.queued = progress.queued
            if progress.tokens > rollout.tokens:
                rollout.tokens = progress.tokens
                rollout.deadline = self.now + self.config.lease_s
                peer.grew = self.now
        if void:
            self._out.append(Send(peer.name, Cancel(tuple(void))))
        if len(listed) < len(peer.held):
            self._resend(peer, [rollout for key, rollout in peer.held.items() if key not in listed])
        self._lend(peer)

    def _resend(self, peer: Peer, missing: list[Rollout]) -> None:
        """Send leases the generator does not list, unless they may still be on their way."""
        patience = 2 * self.config.heartbeat_s
        again = [r for r in missing if self.now - r.sent_at >= patience and r.floor <= peer.version]
        for rollout in [r for r in again if r.resends >= RESENDS]:
            again.remove(rollout)
            self._end(rollout, "lost", blamed=True)
        for rollout in again:
            rollout.sent_at, rollout.tokens, rollout.queued = self.now, 0, True
            rollout.resends += 1
        if again:
            self._out.append(Resend(peer.name, tuple(r.terms for r in again)))

    def _finished(self, event: Finished) -> None:
        peer = self.peers.get(event.generator)
        ref = event.lease
        rollout = peer.held.get((ref.kind, ref.rollout)) if peer else None
        if peer:
            self._hear(peer)
        if peer is None or rollout is None or rollout.attempt != ref.attempt:
            self._answer_stray(event.generator, ref)
        elif event.problem is not None:
            self._end(rollout, "rejected", blamed=True)
            self._out.append(Send(peer.name, Nack(ref, event.problem)))
        else:
            self._release(rollout)
            self._overtime.accepted(peer, rollout, self.now)
            self._out.append(Accepted(peer.name, ref, event.version_first))
            self._out.append(Send(peer.name, Ack(ref)))
            if rollout.kind == "eval":
                self.evals.accept(rollout)
                self._end_of_evaluation(rollout)
            else:
                self.book.accept(rollout, event.version_first)
                self._try_batch()
            peer.grew = self.now
            self._lend(peer)

    def _answer_stray(self, generator: str, ref: LeaseRef) -> None:
        accepted = self._accepted_attempt(ref)
        if accepted == ref.attempt:
            self._out.append(Send(generator, Ack(ref)))
        else:
            reason = "fenced: this attempt had expired" if self.was_granted(ref) else "no such lease"
            self._out.append(Send(generator, Nack(ref, reason)))

    def _accepted_attempt(self, ref: LeaseRef) -> int | None:
        if ref.kind == "eval":
            return self.evals.attempts.get(ref.rollout)
        return self.book.accepted_attempt(ref.rollout)

    def was_granted(self, ref: LeaseRef) -> bool:
        if ref.kind == "eval":
            return self.evals.was_started(ref.rollout)
        return 0 <= ref.rollout < self.book.next_rollout

    def _failed(self, event: Failed) -> None:
        peer = self.peers.get(event.generator)
        if peer is None:
            return
        self._hear(peer)
        rollout = peer.held.get((event.lease.kind, event.lease.rollout))
        if rollout is not None and rollout.attempt == event.lease.attempt:
            self._end(rollout, "returned" if event.returned else "failed", blamed=not event.returned)

    def _unreachable(self, generator: str) -> None:
        peer = self.peers.get(generator)
        if peer is None:
            return
        # A healthy generator comes back within a heartbeat or two; a dead one should not cost a whole lease_s.
        peer.patience = min(peer.patience, self.now - peer.seen + 6 * self.config.heartbeat_s)
        self._alarms.watch_peer(peer)

    def _lose_peer(self, peer: Peer, cause: str, reason: str, blamed: bool) -> None:
        for rollout in list(peer.held.values()):
            self._end(rollout, cause, blamed)
        self._lender.remove(peer)
        self._out.append(PeerGone(peer.name, reason))

    # Leases.

    def _lend(self, peer: Peer) -> None:
        chosen = self._lender.choose(peer, self.now)
        for rollout in chosen:
            (self.evals if rollout.kind == "eval" else self.book).grant(rollout)
            rollout.generator = peer.name
            rollout.sent_at = rollout.granted_at = self.now
            rollout.deadline = self.now + self.config.lease_s
            rollout.resends = rollout.tokens = 0
            rollout.queued = True
            peer.held[(rollout.kind, rollout.number)] = rollout
            self._alarms.watch(rollout)
        if chosen:
            self._out.append(Granted(peer.name, tuple(rollout.terms for rollout in chosen)))

    def _lend_to_all(self) -> None:
        self._lender.stirred = False
        for peer in self.peers.values():
            self._lend(peer)

    def _release(self, rollout: Rollout) -> None:
        del self.peers[rollout.generator].held[(rollout.kind, rollout.number)]
        self._lender.num_held -= 1

    def _end(self, rollout: Rollout, cause: str, blamed: bool) -> None:
        ref = rollout.ref
        self._release(rollout)
        blamed = blamed and self._may_blame(rollout)
        rollout.lost_at = self.now
        if rollout.kind == "eval":
            quarantined = self.evals.end(rollout, cause, blamed)
            self._end_of_evaluation(rollout)
        else:
            quarantined = self.book.end(rollout, cause, blamed)
        self._out.append(Ended(rollout.generator, ref, cause, blamed, quarantined))
        self._lender.stirred = True

    def _may_blame(self, rollout: Rollout) -> bool:
        """One party alone cannot have a prompt given up: while there are others its failures count once in a row."""
        owner = owner_of(rollout.generator)
        again = rollout.blamed_on == owner
        rollout.blamed_on = owner
        return not again or all(owner_of(name) == owner for name in self.peers)

    def _tick(self) -> None:
        for peer in self._alarms.silent(self.now):
            self._lose_peer(peer, "silent", f"no message for {self.now - peer.seen:.1f} s", blamed=True)
        for rollout in self._alarms.overdue(self.now):
            self._out.append(Send(rollout.generator, Cancel((rollout.ref,))))
            self._end(rollout, "deadline", blamed=True)
        for rollout in self._overtime.late(self.wanted, self.now) if self.wanted is not None else ():
            rollout.overtimes += 1
            self._out.append(Send(rollout.generator, Cancel((rollout.ref,))))
            self._end(rollout, "overtime", blamed=False)
        if self._lender.num_grantable:
            self._lender.stirred = True

    # The learner.

    def _take(self, step: int) -> None:
        assert step == self.book.version, f"step {step} trains version {step}, the published one is {self.book.version}"
        self.wanted = step
        self._try_batch()

    def _try_batch(self) -> None:
        if self.wanted is None:
            return
        batch = self.book.compose(self.wanted)
        if batch is not None:
            self.book.take(batch)
            self._out.append(Taken(self.wanted, batch))
            self.wanted = None

    def _publish(self, version: int) -> None:
        if version != self.book.version:
            assert version == self.book.version + 1, f"version {version} published after {self.book.version}"
            self.book.publish()
        self._lender.fair_until = self.now + max(2 * self.config.heartbeat_s, self.config.lease_s / 8)
        self._lender.stirred = True

    def _evaluate(self, version: int) -> None:
        if self.evals.start(version):
            self._lender.stirred = True
            if self.evals.complete(version):
                self._out.append(Evaluated(version))

    def _end_of_evaluation(self, rollout: Rollout) -> None:
        version = self.evals.version_of(rollout.number)
        if self.evals.complete(version):
            self._out.append(Evaluated(version))
