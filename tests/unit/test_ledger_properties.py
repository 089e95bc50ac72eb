"""Every interleaving of what can happen to a ledger, against an oracle that only counts.

The machine plays learner, generators, network and operator; it keeps every entry the ledger makes (the journal), takes
snapshots (checkpoints) and restarts from them. When hypothesis is done with its mischief, one healthy generator must be
enough to finish the run.

`make test` takes at least 20,000 steps; `pytest --long` (or ORZ_LONG=1) over a million.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from orz_async.broker import frontier
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Ack, LeaseRef, Nack, Progress
from orz_async.broker.rollouts import State
from orz_async.broker.transitions import (
    Accepted,
    Action,
    Ended,
    Entry,
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
    Restarted,
    Send,
    Take,
    Taken,
    Terms,
    Tick,
    Unreachable,
)

NAMES = ("a", "b", "c")


def prompt_id(index: int) -> str:
    return f"p{index % 5}"


class Peer:
    """A generator as it sees itself."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.version = -1
        self.claimed = -1
        """What it last said its version is."""
        self.held: dict[LeaseRef, Terms] = {}
        self.tokens: dict[LeaseRef, int] = {}
        self.done: list[LeaseRef] = []
        """Leases it ever gave a result for, or lost: material for late and repeated results."""


class LedgerMachine(RuleBasedStateMachine):
    steps = 0
    """Rules applied by all machines of this process."""

    @initialize(
        prompts=st.integers(1, 3),
        samples=st.integers(1, 2),
        max_lag=st.integers(0, 3),
        slack=st.integers(0, 3),
        steps=st.integers(2, 6),
    )
    def begin(self, prompts: int, samples: int, max_lag: int, slack: int, steps: int) -> None:
        self.config = LedgerConfig(
            rollouts_per_step=prompts * samples,
            samples_per_prompt=samples,
            max_lag=max_lag,
            window=min(slack, max_lag),
            total_steps=steps,
            lease_s=8.0,
            heartbeat_s=1.0,
            max_attempts=2,
            eval_rollouts=2,
        )
        self.ledger = Ledger(self.config, prompt_id)
        self.now = 0.0
        self.peers: dict[str, Peer] = {}
        self.journal: list[Entry] = []
        self.snapshots: list[tuple[bytes, int, int, int]] = [(frontier.save(self.ledger.book), 0, 0, 0)]
        """(bytes, journal position, version, batches trained)."""
        self.epoch = 0
        self.newest = 0
        """The newest version ever published: admission may have gone so far."""
        self.attempts: set[LeaseRef] = set()
        self.ends: dict[LeaseRef, str] = {}
        self.versions: dict[int, int] = {}
        """Oldest version of each accepted rollout."""
        self.batches: list[tuple[int, ...]] = []
        """Trained by the weights that live now."""
        self.decided: dict[int, tuple[int, ...]] = {}
        """Every batch ever taken, by step."""
        self.taken: tuple[int, ...] | None = None
        self.accepted: dict[int, int] = {}
        """Attempt that counts, by rollout."""
        self.prompts: dict[LeaseRef, int] = {}
        """What each attempt samples."""
        self.blamed: dict[tuple[int, int], int] = {}
        """Failures by rollout and prompt."""
        self.evaluated: set[int] = set()
        self.evaluating: set[int] = set()
        self.send(Publish(0))
        for name, slots in (("a", 9), ("b", 4)):
            self.join(name, slots, True)

    # Plumbing.

    def send(self, event: Event) -> list[Action]:
        actions = self.ledger.handle(event, self.now)
        for action in actions:
            self.observe(action)
        return actions

    def observe(self, action: Action) -> None:
        book = self.ledger.book
        match action:
            case Granted():
                train = tuple(t for t in action.terms if t.kind == "train")
                self.journal.append(Granted(action.generator, train))
                self.deliver(action.generator, action.terms)
                for terms in train:
                    assert terms.ref not in self.attempts, "an attempt was granted twice"
                    self.attempts.add(terms.ref)
                    assert terms.rollout < self.config.total_steps * self.config.rollouts_per_step
                    nominal = terms.rollout // self.config.rollouts_per_step
                    assert book.version >= nominal - self.config.head_start
                    assert min(book.version, self.peers[action.generator].claimed) >= terms.version_floor
                    self.check_prompt(terms)
                peer = self.ledger.peers[action.generator]
                assert len(peer.held) <= peer.slots, "more leases than credit"
            case Resend():
                self.deliver(action.generator, action.terms)
            case Accepted():
                if action.lease.kind == "train":
                    self.journal.append(action)
                    self.versions[action.lease.rollout] = action.version_first
                    self.accepted[action.lease.rollout] = action.lease.attempt
            case Ended():
                if action.lease.kind == "train":
                    self.journal.append(action)
                    self.end(action.lease, "quarantined" if action.quarantined else "expired")
                    key = (action.lease.rollout, self.prompts[action.lease])
                    self.blamed[key] = self.blamed.get(key, 0) + action.blamed
                    assert bool(action.quarantined) == (action.blamed and self.blamed[key] == self.config.max_attempts)
            case Taken():
                self.journal.append(action)
                assert self.decided.get(action.step, action.rollouts) == action.rollouts, "a batch was recomposed"
                self.decided[action.step] = self.taken = action.rollouts
                assert list(action.rollouts) == sorted(set(action.rollouts))
                assert len(action.rollouts) == self.config.rollouts_per_step
                for number in action.rollouts:
                    assert action.step - self.versions[number] <= self.config.max_lag, "the bound is broken"
                if self.config.window == 0:
                    assert action.rollouts[0] == action.step * self.config.rollouts_per_step
                    assert action.rollouts[-1] == (action.step + 1) * self.config.rollouts_per_step - 1
            case Evaluated():
                assert action.version in self.evaluating
                self.evaluating.discard(action.version)
            case PeerGone():
                assert action.generator not in self.ledger.peers
            case Send():
                pass

    def deliver(self, name: str, terms: tuple[Terms, ...]) -> None:
        peer = self.peers[name]
        for term in terms:
            peer.held[term.ref] = term
            peer.tokens.setdefault(term.ref, 0)

    def check_prompt(self, terms: Terms) -> None:
        """Never one that failed too often here; the same as its siblings' unless one of theirs was given up."""
        assert self.blamed.get((terms.rollout, terms.prompt), 0) < self.config.max_attempts
        self.prompts[terms.ref] = terms.prompt
        size = self.config.samples_per_prompt
        siblings = range(terms.rollout // size * size, terms.rollout // size * size + size)
        if not any(count >= self.config.max_attempts for (n, _), count in self.blamed.items() if n in siblings):
            assert {p for ref, p in self.prompts.items() if ref.rollout in siblings} == {terms.prompt}

    def end(self, ref: LeaseRef, how: str) -> None:
        assert ref in self.attempts
        assert ref not in self.ends, f"{ref} ended as {self.ends[ref]} and as {how}"
        self.ends[ref] = how

    def pick(self, data: st.DataObject, refs: list[LeaseRef]) -> LeaseRef | None:
        return data.draw(st.sampled_from(sorted(refs, key=lambda r: (r.kind, r.rollout, r.attempt)))) if refs else None

    # Generators.

    @rule(name=st.sampled_from(NAMES), slots=st.sampled_from((0, 2, 5, 9)), fresh=st.booleans())
    def join(self, name: str, slots: int, fresh: bool) -> None:
        if fresh or name not in self.peers:
            self.peers[name] = Peer(slots)
        self.send(Joined(name, slots))

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def heartbeat(self, name: str, data: st.DataObject) -> None:
        if name not in self.peers:
            return
        peer = self.peers[name]
        if name not in self.ledger.peers:
            self.send(Joined(name, 0))
        # Weights can be fetched a moment before they are announced.
        newest = self.ledger.book.version + (self.taken is not None)
        peer.version = newest if data.draw(st.booleans()) else data.draw(st.integers(peer.version, newest))
        lossy = data.draw(st.integers(0, 9)) == 9
        grows = data.draw(st.sampled_from(("all", "none", "some")))
        progress = []
        for index, ref in enumerate(list(peer.held)):
            if lossy and index % 3 == 0:
                del peer.held[ref]  # lost on the way, or in a crash
                continue
            peer.tokens[ref] += grows == "all" or (grows == "some" and index % 2 == 0)
            progress.append(Progress(ref, peer.tokens[ref], queued=index % 3 == 2))
        # It may also boast of weights that do not exist; that brings it nothing.
        peer.claimed = peer.version if data.draw(st.integers(0, 9)) else peer.version + 10**6
        for action in self.send(Heartbeat(name, peer.slots, peer.claimed, tuple(progress))):
            if isinstance(action, Send) and not isinstance(action.message, Ack | Nack):
                for ref in action.message.leases:
                    if peer.held.pop(ref, None):
                        peer.done.append(ref)

    @rule(name=st.sampled_from(NAMES), data=st.data(), share=st.sampled_from((1, 3, 3)), good=st.booleans())
    def results(self, name: str, data: st.DataObject, share: int, good: bool) -> None:
        """A heartbeat, then results of a third or of all it holds, sampled by any versions it has served."""
        self.heartbeat(name, data)
        peer = self.peers.get(name)
        if peer is None:
            return
        ready = [ref for ref in peer.held if peer.held[ref].version_floor <= peer.version]
        count = -(-len(ready) * share // 3)
        for ref in data.draw(st.permutations(ready))[:count]:
            terms = peer.held.pop(ref)
            peer.done.append(ref)
            oldest = data.draw(st.sampled_from((terms.version_floor, peer.version)))
            due = self.ledger.terms(name, ref)
            assert due is None or due == terms
            bad = not good and due is not None and data.draw(st.integers(0, 2)) == 0
            self.finish(name, ref, oldest, "nonsense" if bad else None)

    def finish(self, name: str, ref: LeaseRef, version: int, problem: str | None) -> None:
        due = self.ledger.terms(name, ref) is not None
        actions = self.send(Finished(name, ref, version, problem))
        answers = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Ack | Nack)]
        assert len(answers) == 1, "every result is answered once"
        assert any(isinstance(a, Accepted) for a in actions) == (due and problem is None)
        if ref.kind == "train" and not due:
            assert isinstance(answers[0], Ack) == (self.accepted.get(ref.rollout) == ref.attempt)

    @rule(data=st.data(), share=st.sampled_from((1, 3)))
    def all_is_well(self, data: st.DataObject, share: int) -> None:
        """Most of a run."""
        for name in list(self.peers):
            self.results(name, data, share, True)
        self.train(False)

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def late_or_repeated_result(self, name: str, data: st.DataObject) -> None:
        peer = self.peers.get(name)
        ref = self.pick(data, [r for r in peer.done if r not in peer.held]) if peer else None
        if ref is not None and self.ledger.terms(name, ref) is None:
            self.finish(name, ref, 0, None)

    @rule(name=st.sampled_from(NAMES), data=st.data(), returned=st.booleans())
    def failure(self, name: str, data: st.DataObject, returned: bool) -> None:
        peer = self.peers.get(name)
        ref = self.pick(data, list(peer.held)) if peer else None
        if peer is not None and ref is not None:
            del peer.held[ref]
            peer.done.append(ref)
            self.send(Failed(name, ref, "it broke", returned))

    @rule(name=st.sampled_from(NAMES), rare=st.integers(0, 2))
    def leave(self, name: str, rare: int) -> None:
        if rare:
            return
        self.peers.pop(name, None)
        self.send(Left(name, "enough"))

    @rule(name=st.sampled_from(NAMES))
    def connection_breaks(self, name: str) -> None:
        self.send(Unreachable(name))

    @rule(seconds=st.sampled_from((0.3, 1.0, 5.0, 9.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.send(Tick())

    # The learner.

    def take(self) -> None:
        if self.taken is None and self.ledger.wanted is None and self.ledger.book.version < self.config.total_steps:
            self.send(Take(self.ledger.book.version))

    @rule(evaluate=st.booleans())
    def train(self, evaluate: bool) -> None:
        """Ask for a batch, or publish what the last one made."""
        self.take()
        if self.taken is None:
            return
        version = self.ledger.book.version + 1
        if evaluate and version not in self.evaluated:
            self.evaluated.add(version)
            self.evaluating.add(version)
            self.send(Evaluate(version))
        self.batches.append(self.taken)
        self.taken = None
        self.send(Publish(version))
        self.newest = max(self.newest, version)

    @rule(data=st.data(), save=st.booleans(), die=st.booleans())
    def a_straggler_arrives_while_the_step_trains(self, data: st.DataObject, save: bool, die: bool) -> None:
        """Within a window the batch goes without it, and must do so again after a restart."""
        if self.config.window == 0 or self.taken is not None:
            return
        for name, peer in self.peers.items():
            self.heartbeat(name, data)
            for ref in sorted(peer.held, key=lambda ref: ref.rollout)[1:]:
                self.deliver_result(name, ref)
        self.take()
        if save:
            self.checkpoint()
        for name, peer in self.peers.items():
            for ref in list(peer.held):
                self.deliver_result(name, ref)
        if die:
            self.learner_dies(0, 0, data)

    def deliver_result(self, name: str, ref: LeaseRef) -> None:
        peer = self.peers[name]
        if peer.held[ref].version_floor <= peer.version:
            del peer.held[ref]
            peer.done.append(ref)
            self.finish(name, ref, peer.version, None)

    @rule()
    def checkpoint(self) -> None:
        book = self.ledger.book
        saved = frontier.save(book)
        assert frontier.save(frontier.load(saved, self.config, prompt_id)) == saved
        self.snapshots.append((saved, len(self.journal), book.version, len(self.batches)))

    @rule(back=st.integers(0, 1), rare=st.integers(0, 2), data=st.data())
    def learner_dies(self, back: int, rare: int, data: st.DataObject) -> None:
        """Restart from the newest checkpoint or the one before; now and then a trajectory is gone from the journal."""
        if rare:
            return
        del self.snapshots[len(self.snapshots) - min(back, len(self.snapshots) - 1) :]
        saved, position, version, trained = self.snapshots[-1]
        book = frontier.load(saved, self.config, prompt_id)
        for entry in self.journal[position:]:
            frontier.replay(book, entry)
        ready = [n for n, r in book.rollouts.items() if r.state in (State.READY, State.TAKEN)]
        lost = tuple(n for n in ready if data.draw(st.integers(0, 19)) == 0)
        self.epoch += 1
        self.journal.append(Restarted(self.epoch, lost))
        ended = book.restart(lost)
        assert {rollout.number for rollout, cause in ended if cause == "journal_lost"} == set(lost)
        for rollout, cause in ended:
            self.end(rollout.ref, "expired")
            assert cause in ("learner_restart", "journal_lost")
            if cause == "journal_lost":
                assert self.accepted.pop(rollout.number) == rollout.attempt
        assert book.version == version
        assert not [r for r in book.rollouts.values() if r.state in (State.HELD, State.TAKEN)]
        del self.batches[trained:]
        self.taken = None
        self.evaluated.clear()
        self.evaluating.clear()
        self.ledger = Ledger(self.config, prompt_id, book)
        for peer in self.peers.values():
            peer.done += peer.held
            peer.held.clear()
            peer.version = -1
        self.send(Publish(version))

    # What must hold at any time.

    @invariant()
    def steps_are_counted(self) -> None:
        LedgerMachine.steps += hasattr(self, "ledger")

    @invariant()
    def something_can_always_happen(self) -> None:
        """No deadlock: the run is over, or the learner trains, or what the step waits for is held by a generator that
        is watched, or can be granted to whoever serves the present version."""
        if not hasattr(self, "ledger"):
            return
        book, config = self.ledger.book, self.config
        waiting = [r for r in book.rollouts.values() if r.state in (State.HELD, State.LOST)]
        assert sorted(book.lost) == sorted(r.number for r in waiting if r.state is State.LOST)
        evaluating = self.ledger.evals.rollouts.values()
        watched = {(id(r), attempt) for _, _, attempt, r in self.ledger._alarms._leases}
        assert all((id(r), r.attempt) in watched for r in (*waiting, *evaluating) if r.state is State.HELD)
        silences = set(self.ledger._alarms._silences)
        assert all((peer.alarm, name) in silences for name, peer in self.ledger.peers.items())
        if self.taken is not None or book.version == config.total_steps:
            return
        size, ready = config.rollouts_per_step, {n for n, r in book.rollouts.items() if r.state is State.READY}
        bound, due = book.bound.get(book.version, ()), (book.version - config.window + 1) * size
        if bound:
            missing = set(bound) - ready
            assert missing <= {r.number for r in waiting if r.floor <= book.version}
        else:
            missing = {r.number for r in waiting if r.number < due} | set(range(book.next_rollout, due))
            assert due <= book.limit and all(book.floor(number) <= book.version for number in missing)
            # Of an earlier life there may be rollouts that wait for versions still to be published again.
            possible = [r for r in waiting if r.state is State.HELD or r.floor <= book.version]
            assert size <= len(ready) + len(possible) + max(0, book.limit - book.next_rollout)
            missing = missing or ({-1} if len(ready) < size else set())
        if self.ledger.wanted is not None:
            assert missing, "the batch is complete and was not taken"

    @invariant()
    def attempts_are_conserved(self) -> None:
        if not hasattr(self, "ledger"):
            return
        book, counts = self.ledger.book, self.ledger.book.counts
        alive = [r for r in book.rollouts.values() if r.state is not State.LOST]
        assert counts.in_flight == len(alive)
        assert counts.granted == len(self.attempts)
        assert counts.trained == sum(map(len, self.batches))
        assert counts.quarantined == sum(how == "quarantined" for how in self.ends.values())
        assert sum(counts.expired.values()) == sum(how == "expired" for how in self.ends.values())
        assert all(r.ref not in self.ends for r in alive)

    @invariant()
    def rollouts_are_trained_once_and_none_is_lost(self) -> None:
        if not hasattr(self, "ledger"):
            return
        book = self.ledger.book
        trained = [number for batch in self.batches for number in batch]
        assert len(trained) == len(set(trained))
        assert set(trained) | set(book.rollouts) == set(range(book.next_rollout))
        assert not set(trained) & set(book.rollouts)

    @invariant()
    def slots_and_credit_are_kept(self) -> None:
        if not hasattr(self, "ledger"):
            return
        book = self.ledger.book
        limit = (self.newest + self.config.head_start + 1) * self.config.rollouts_per_step
        assert book.next_rollout <= limit
        if self.newest == book.version:
            assert len(book.rollouts) <= (self.config.head_start + 1) * self.config.rollouts_per_step
        held = [r for r in (*book.rollouts.values(), *self.ledger.evals.rollouts.values()) if r.state is State.HELD]
        assert sum(len(peer.held) for peer in self.ledger.peers.values()) == len(held) == self.ledger._lender.num_held
        assert self.ledger._lender.num_slots == sum(peer.slots for peer in self.ledger.peers.values())

    def teardown(self) -> None:
        """No deadlock: whatever happened, one healthy generator finishes the run, and nothing is in flight then."""
        if not hasattr(self, "ledger"):
            return
        self.peers.setdefault("a", Peer(0)).slots = 4  # the others stay as they are, and silent
        peer = self.peers["a"]
        peer.held.clear()
        self.send(Joined("a", 4))
        for _ in range(60 * self.config.total_steps + 100):
            self.now += 1.0
            peer.version = peer.claimed = self.ledger.book.version
            progress = []
            for ref in peer.held:
                peer.tokens[ref] += 1
                progress.append(Progress(ref, peer.tokens[ref], False))
            self.send(Heartbeat("a", 4, peer.version, tuple(progress)))
            for ref in list(peer.held):
                del peer.held[ref]
                self.finish("a", ref, peer.version, None)
            self.send(Tick())
            self.train(False)
            if self.ledger.book.version == self.config.total_steps and not self.evaluating:
                break
        assert self.ledger.book.version == self.config.total_steps, "deadlock"
        assert not self.evaluating
        assert self.ledger.book.counts.in_flight == 0
        assert not self.ledger.book.rollouts


@pytest.mark.timeout(4 * 3600)  # for --long; otherwise it takes seconds
def test_every_interleaving(long: bool) -> None:
    examples, steps = (20_000, 120) if long else (220, 60)
    before = LedgerMachine.steps
    # How many steps an example takes is hypothesis' choice: about three quarters of what it may.
    while LedgerMachine.steps - before < 20_000:
        run_state_machine_as_test(
            LedgerMachine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
