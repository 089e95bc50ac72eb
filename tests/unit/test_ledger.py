"""The ledger's rules, one by one, at chosen moments. Interleavings are in test_ledger_properties.py."""

from __future__ import annotations

import msgspec
import pytest

from orz_async.broker import frontier
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Ack, Cancel, LeaseRef, Nack, Progress
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
from orz_async.errors import CheckpointError


def prompt_id(index: int) -> str:
    return f"p{index % 10}"


class Desk:
    """A ledger and a clock."""

    def __init__(self, **changes: object) -> None:
        fields = {
            "rollouts_per_step": 4,
            "samples_per_prompt": 2,
            "max_lag": 1,
            "total_steps": 5,
            "lease_s": 10.0,
            "heartbeat_s": 1.0,
            "max_attempts": 2,
            "eval_rollouts": 2,
        } | changes
        self.config = LedgerConfig(**fields)  # type: ignore[arg-type]
        self.ledger = Ledger(self.config, prompt_id)
        self.now = 100.0
        self.send(Publish(0))

    def send(self, event: Event, after: float = 0.0) -> list[Action]:
        self.now += after
        return self.ledger.handle(event, self.now)

    def join(self, name: str, slots: int = 100, version: int = 0) -> list[Terms]:
        self.send(Joined(name, slots))
        return self.beat(name, slots, version)

    def beat(self, name: str, slots: int = 100, version: int = 0, held: list[Progress] | None = None) -> list[Terms]:
        if held is None:
            peer = self.ledger.peers[name]
            held = [Progress(r.ref, r.tokens, r.queued) for r in peer.held.values()]
        return granted(self.send(Heartbeat(name, slots, version, tuple(held))))

    def finish(self, name: str, terms: Terms, problem: str | None = None) -> list[Action]:
        return self.send(Finished(name, terms.ref, terms.version_floor, problem))

    def train(self, name: str, step: int) -> None:
        """Have `name` finish everything, take, publish."""
        for rollout in list(self.ledger.peers[name].held.values()):
            self.finish(name, rollout.terms)
        assert kinds(self.send(Take(step))) == [Taken]
        self.send(Publish(step + 1))


def granted(actions: list[Action]) -> list[Terms]:
    return [terms for action in actions if isinstance(action, Granted) for terms in action.terms]


def kinds(actions: list[Action]) -> list[type]:
    return [type(action) for action in actions]


def answers(actions: list[Action]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Send)]


def test_admission_follows_the_version_and_the_floor() -> None:
    desk = Desk(max_lag=1)
    terms = desk.join("a")
    assert [t.rollout for t in terms] == list(range(8))
    assert {t.version_floor for t in terms} == {0}
    desk.train("a", 0)
    terms = desk.beat("a", version=1)
    assert [t.rollout for t in terms] == [8, 9, 10, 11]
    assert {t.version_floor for t in terms} == {1}


def test_a_generator_behind_gets_nothing_until_it_serves_the_floor() -> None:
    desk = Desk(max_lag=0)
    desk.join("a", version=0)
    desk.train("a", 0)
    assert desk.beat("a", version=0) == []
    assert [t.rollout for t in desk.beat("a", version=1)] == [4, 5, 6, 7]


def test_a_claim_to_serve_the_future_admits_nothing_more() -> None:
    desk = Desk(max_lag=0)
    assert [t.rollout for t in desk.join("a", version=10**9)] == [0, 1, 2, 3]


def test_no_rollout_beyond_the_last_step() -> None:
    desk = Desk(max_lag=1, total_steps=2)
    desk.join("a")
    desk.train("a", 0)
    desk.train("a", 1)
    assert desk.beat("a", version=2) == []
    assert desk.ledger.book.counts.funnel() == {
        "granted": 8,
        "trained": 8,
        "expired": {},
        "quarantined": 0,
        "in_flight": 0,
    }


def test_first_in_first_out_without_a_window() -> None:
    desk = Desk(max_lag=1)
    terms = desk.join("a")
    for term in terms[1:]:
        desk.finish("a", term)
    assert desk.send(Take(0)) == []
    assert Taken(0, (0, 1, 2, 3)) in desk.finish("a", terms[0])


def test_a_window_lets_a_straggler_slip_but_not_further() -> None:
    desk = Desk(max_lag=2, window=1)
    terms = desk.join("a")
    assert len(terms) == 8
    for term in terms[1:]:
        desk.finish("a", term)
    assert desk.send(Take(0)) == [Taken(0, (1, 2, 3, 4))]
    desk.send(Publish(1))
    for rollout in list(desk.ledger.peers["a"].held.values())[1:]:
        desk.finish("a", rollout.terms)
    assert desk.send(Take(1)) == []  # rollout 0 may slip one step, not two
    assert Taken(1, (0, 5, 6, 7)) in desk.finish("a", terms[0])


def test_credit_is_what_the_generator_declared() -> None:
    desk = Desk(max_lag=1)
    terms = desk.join("a", slots=3)
    assert len(terms) == 3
    assert len(granted(desk.finish("a", terms[0]))) == 1
    assert desk.beat("a", slots=0) == []
    assert granted(desk.finish("a", terms[1])) == []


def test_fair_shares_after_a_publication_and_everything_later() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=10, lease_s=16.0)
    desk.send(Joined("slow", 30))
    assert len(desk.join("quick", slots=10)) == 3  # 10 of 40 slots, rounded up
    assert desk.beat("quick", slots=10) == []
    desk.now += 2.1  # the slow one had its chance
    assert len(desk.beat("quick", slots=10)) == 7


def test_a_lost_lease_goes_to_another_generator_first() -> None:
    desk = Desk(max_lag=0)
    first = desk.join("a", slots=2)
    desk.send(Joined("b", 4))
    actions = desk.send(Failed("a", first[0].ref, "engine", returned=False))
    assert [t.rollout for t in granted(actions)] == [2]  # its freed slot gets another one
    again = desk.beat("b", slots=4)
    assert (again[0].rollout, again[0].attempt, again[0].prompt) == (first[0].rollout, 1, first[0].prompt)


def test_a_lost_lease_comes_back_when_the_others_do_not_take_it() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=2)
    lost, _ = desk.join("a", slots=2)
    desk.join("b", slots=2, version=-1)  # alive, but its weights never arrive
    assert granted(desk.send(Failed("a", lost.ref, "engine", returned=False))) == []
    for _ in range(3):
        desk.now += 3
        assert desk.beat("a", 2) == []
        desk.beat("b", 2, version=-1)
    desk.now += 3
    assert [(t.rollout, t.attempt) for t in desk.beat("a", 2)] == [(0, 1)]


def test_progress_renews_a_running_lease_and_its_absence_ends_it() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=2)
    running, frozen = desk.join("a", slots=2)
    for tokens in range(1, 4):
        desk.now += 4
        desk.beat("a", 2, held=[Progress(running.ref, tokens, False), Progress(frozen.ref, 1, False)])
    ended = [a for a in desk.send(Tick()) if isinstance(a, Ended)]
    assert ended == []
    actions = desk.send(Tick(), after=2.5)
    assert [a for a in actions if isinstance(a, Ended)] == [Ended("a", frozen.ref, "deadline", True, "")]
    assert Cancel((frozen.ref,)) in answers(actions)


def test_a_queued_lease_lives_on_the_progress_of_others() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=2)
    running, queued = desk.join("a", slots=2)
    for tokens in range(1, 9):
        desk.now += 4
        desk.beat("a", 2, held=[Progress(running.ref, tokens, False), Progress(queued.ref, 0, True)])
        assert desk.send(Tick()) == []
    for _ in range(3):
        desk.now += 4
        desk.beat("a", 2, held=[Progress(running.ref, 8, False), Progress(queued.ref, 0, True)])
    assert {a.lease.rollout for a in desk.send(Tick()) if isinstance(a, Ended)} == {0, 1}


def test_late_result_of_an_expired_attempt_is_fenced() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=2)
    old = desk.join("a", slots=2)[0]
    desk.send(Joined("b", 2))
    desk.send(Left("a", "gone"))
    new = desk.beat("b", 2)[0]
    assert (new.rollout, new.attempt) == (old.rollout, 1)
    assert answers(desk.finish("a", old)) == [Nack(old.ref, "fenced: this attempt had expired")]
    assert answers(desk.finish("b", new)) == [Ack(new.ref)]
    assert answers(desk.finish("a", old)) == [Nack(old.ref, "fenced: this attempt had expired")]


def test_repeated_result_is_acknowledged_again_also_after_training() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=2)
    first, second = desk.join("a", slots=2)
    assert kinds(desk.finish("a", first))[:2] == [Accepted, Send]
    assert desk.finish("a", first) == [Send("a", Ack(first.ref))]
    desk.finish("a", second)
    desk.send(Take(0))
    desk.send(Publish(1))
    before = msgspec.json.encode(desk.ledger.book.counts)
    assert answers(desk.finish("a", first)) == [Ack(first.ref)]
    assert msgspec.json.encode(desk.ledger.book.counts) == before


def test_unknown_and_foreign_leases_are_refused() -> None:
    desk = Desk()
    terms = desk.join("a")[0]
    desk.send(Joined("b", 1))
    assert isinstance(answers(desk.finish("b", terms))[0], Nack)
    for ref in (
        LeaseRef("train", 10**12, 0),
        LeaseRef("train", -1, 0),
        LeaseRef("eval", 0, 0),
        LeaseRef("eval", -5, 0),
    ):
        assert answers(desk.send(Finished("a", ref, 0))) == [Nack(ref, "no such lease")]
    assert answers(desk.finish("a", terms)) == [Ack(terms.ref)]


def test_silence_takes_the_leases_and_speech_brings_the_generator_back() -> None:
    desk = Desk(max_lag=0)
    lost = desk.join("a")
    actions = desk.send(Tick(), after=10.0)
    assert [a.cause for a in actions if isinstance(a, Ended)] == ["silent"] * 4
    assert [a.generator for a in actions if isinstance(a, PeerGone)] == ["a"]
    desk.send(Joined("a", 0))
    actions = desk.send(Heartbeat("a", 4, 0, (Progress(lost[0].ref, 5, False),)))
    assert answers(actions) == [Cancel((lost[0].ref,))]
    assert [t.attempt for t in granted(actions)] == [1] * 4


def test_a_broken_connection_shortens_patience_and_a_return_restores_it() -> None:
    desk = Desk(lease_s=100.0)
    desk.join("a")
    desk.join("b")
    desk.send(Unreachable("a"))
    desk.send(Unreachable("b"))
    desk.send(Joined("b", 100), after=3.0)
    gone = [a.generator for a in desk.send(Tick(), after=4.0) if isinstance(a, PeerGone)]
    assert gone == ["a"]


def test_reconnection_keeps_listed_leases_and_resends_the_others() -> None:
    desk = Desk(max_lag=0)
    terms = desk.join("a")
    listed = [Progress(t.ref, 1, False) for t in terms[:3]]
    desk.send(Joined("a", 100), after=1.0)
    assert desk.send(Heartbeat("a", 100, 0, tuple(listed))) == []  # the fourth may still be on its way
    assert desk.send(Heartbeat("a", 100, 0, tuple(listed)), after=1.5) == [Resend("a", (terms[3],))]
    assert desk.ledger.book.counts.granted == 4


def test_a_lease_that_keeps_getting_lost_is_given_up() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=2, lease_s=1000.0)
    terms = desk.join("a", slots=2)
    causes = []
    for _ in range(5):
        actions = desk.send(Heartbeat("a", 2, 0, (Progress(terms[1].ref, 1, False),)), after=3.0)
        causes += [a.cause for a in actions if isinstance(a, Ended)]
    assert causes[0] == "lost"


def test_a_prompt_that_keeps_failing_is_replaced_for_the_rest_of_its_group() -> None:
    desk = Desk(max_lag=0, max_attempts=2)
    desk.join("a", slots=1)
    for attempt in range(2):
        terms = next(iter(desk.ledger.peers["a"].held.values())).terms
        assert (terms.rollout, terms.attempt, terms.prompt) == (0, attempt, 0)
        actions = desk.send(Failed("a", terms.ref, "it crashes the engine", returned=False))
    assert [bool(a.quarantined) for a in actions if isinstance(a, Ended)] == [True]
    assert [(t.rollout, t.attempt, t.prompt) for t in granted(actions)] == [(0, 2, 1)]
    assert desk.ledger.book.prompts.quarantined.keys() == {"p0"}
    terms = desk.beat("a", slots=4)
    assert [(t.rollout, t.prompt, t.sample) for t in terms] == [(1, 1, 1), (2, 2, 0), (3, 2, 1)]
    assert desk.ledger.book.counts.funnel() == {
        "granted": 6,
        "trained": 0,
        "expired": {"failed": 1},
        "quarantined": 1,
        "in_flight": 4,
    }


def test_siblings_of_a_quarantined_prompt_finish_or_follow() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=3, samples_per_prompt=3, max_attempts=1)
    terms = desk.join("a", slots=3)
    assert [t.prompt for t in terms] == [0, 0, 0]
    assert [t.prompt for t in granted(desk.send(Failed("a", terms[0].ref, "", returned=False)))] == [1]
    # A sibling that was being sampled fails too: it joins the group's new prompt instead of replacing that as well.
    assert [t.prompt for t in granted(desk.send(Failed("a", terms[1].ref, "", returned=False)))] == [1]
    assert answers(desk.finish("a", terms[2])) == [Ack(terms[2].ref)]
    assert desk.ledger.book.prompts.cursor == 2


def test_a_quarantined_prompt_is_skipped_when_the_data_come_round_again() -> None:
    desk = Desk(rollouts_per_step=20, samples_per_prompt=1, max_lag=0, max_attempts=1)
    desk.join("a", slots=1)
    first = next(iter(desk.ledger.peers["a"].held.values())).terms
    desk.send(Failed("a", first.ref, "", returned=False))
    prompts = [t.prompt for t in desk.beat("a", slots=20)]
    assert prompts == [*range(2, 10), *range(11, 20), 21, 22]


def test_returned_leases_are_nobodys_fault() -> None:
    desk = Desk(max_lag=0, max_attempts=1, rollouts_per_step=2)
    terms = desk.join("a", slots=2)
    desk.beat("a", slots=0)
    for term in terms:
        desk.send(Failed("a", term.ref, "drain", returned=True))
    desk.send(Left("a", "bye"))
    assert [(t.rollout, t.attempt, t.prompt) for t in desk.join("b")] == [(0, 1, 0), (1, 1, 0)]
    assert desk.ledger.book.counts.expired == {"returned": 2}


def test_evaluations_go_first_to_generators_that_serve_the_version_and_cost_no_slots() -> None:
    desk = Desk(max_lag=0)
    desk.send(Evaluate(0))
    terms = desk.join("a", slots=5)
    assert [(t.kind, t.rollout) for t in terms] == [("eval", 0), ("eval", 1), ("train", 0), ("train", 1), ("train", 2)]
    desk.finish("a", terms[0])
    assert Evaluated(0) in desk.finish("a", terms[1])
    assert desk.ledger.book.counts.granted == 4
    desk.train("a", 0)
    desk.send(Evaluate(1))
    assert desk.beat("a", version=0) == []
    terms = desk.beat("a", version=1)
    assert [(t.kind, t.rollout, t.version_floor) for t in terms[:2]] == [("eval", 2, 1), ("eval", 3, 1)]


def test_an_evaluation_does_not_hang_on_one_prompt() -> None:
    desk = Desk(max_lag=0, max_attempts=2)
    desk.send(Evaluate(0))
    terms = desk.join("a", slots=2)
    desk.finish("a", terms[1])
    desk.finish("a", terms[0], "nonsense")
    again = next(r.terms for r in desk.ledger.peers["a"].held.values() if r.kind == "eval")
    assert again.attempt == 1
    assert Evaluated(0) in desk.finish("a", again, "nonsense")


def test_steps_out_of_order_are_bugs() -> None:
    desk = Desk()
    with pytest.raises(AssertionError, match="step 1 trains version 1, the published one is 0"):
        desk.send(Take(1))
    with pytest.raises(AssertionError, match="without a batch"):
        desk.send(Publish(1))
    with pytest.raises(AssertionError, match="version 2 published after 0"):
        desk.send(Publish(2))


def test_restored_snapshot_is_the_same_ledger() -> None:
    desk = Desk(max_lag=1)
    terms = desk.join("a")
    desk.finish("a", terms[2])
    desk.send(Failed("a", terms[3].ref, "", returned=False))
    saved = frontier.save(desk.ledger.book)
    assert frontier.save(frontier.load(saved, desk.config, prompt_id)) == saved


def test_a_batch_in_training_at_the_snapshot_stays_that_batch() -> None:
    desk = Desk(max_lag=2, window=1)
    terms = desk.join("a")
    for term in terms[1:6]:
        desk.finish("a", term)
    assert desk.send(Take(0)) == [Taken(0, (1, 2, 3, 4))]
    saved = frontier.save(desk.ledger.book)
    accepted = [a for a in desk.finish("a", terms[0]) if isinstance(a, Accepted)]
    book = frontier.load(saved, desk.config, prompt_id)
    frontier.replay(book, accepted[0])
    assert [(r.number, cause) for r, cause in book.restart()] == [(6, "learner_restart"), (7, "learner_restart")]
    desk.ledger = Ledger(desk.config, prompt_id, book)
    assert desk.send(Take(0)) == [Taken(0, (1, 2, 3, 4))]  # without the restart's memory it would be 0, 1, 2, 3


def test_another_configuration_is_refused() -> None:
    desk = Desk()
    saved = frontier.save(desk.ledger.book)
    with pytest.raises(CheckpointError, match="made with max_lag = 1, the configuration now says 3"):
        frontier.load(saved, msgspec.structs.replace(desk.config, max_lag=3), prompt_id)
    with pytest.raises(CheckpointError, match="cannot be read"):
        frontier.load(saved[:-1], desk.config, prompt_id)
