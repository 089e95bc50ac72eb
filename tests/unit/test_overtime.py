"""A lease that holds up a step: when it is lent again, when it is not, and who can have a prompt given up."""

from __future__ import annotations

import pytest
from test_ledger import Desk, granted, kinds

from orz_async.broker.messages import Cancel, Progress
from orz_async.broker.transitions import Action, Ended, Failed, Send, Take, Taken, Terms, Tick
from orz_async.config import BrokerConfig
from orz_async.errors import ConfigError


def trickle(desk: Desk, name: str, tokens: int, slots: int = 2) -> None:
    """The least progress that renews every lease it holds."""
    held = desk.ledger.peers[name].held.values()
    desk.beat(name, slots, held=[Progress(r.ref, tokens, False) for r in held])


def overtimes(actions: list[Action]) -> list[int]:
    return [a.lease.rollout for a in actions if isinstance(a, Ended) and a.cause == "overtime"]


def hold(desk: Desk, seconds: float, start: int = 0) -> tuple[float | None, list[Action]]:
    """`thief` trickles, everybody else is alive; after how long the lease was taken from it, and what was decided."""
    for second in range(int(seconds)):
        desk.now += 1
        trickle(desk, "thief", start + second + 1)
        for name in desk.ledger.peers:
            if name != "thief":
                trickle(desk, name, 0, 8)
        actions = desk.send(Tick())
        if overtimes(actions):
            return second + 1.0, actions
    return None, []


def robbed(**changes: object) -> tuple[Desk, list[Terms]]:
    """Two honest generators that needed 5 s, and a thief with two leases of the step that the learner waits for."""
    desk = Desk(max_lag=0, rollouts_per_step=6, total_steps=4, **changes)
    stolen = desk.join("thief", 2)
    for name in ("a", "b"):
        assert len(desk.join(name, 2)) == 2
    desk.now += 5
    for name in ("a", "b"):
        for rollout in list(desk.ledger.peers[name].held.values()):
            desk.finish(name, rollout.terms)
    for name in ("a", "b"):
        desk.beat(name, 8)
    assert kinds(desk.send(Take(0))) == []
    return desk, stolen


def test_a_trickle_of_progress_does_not_hold_a_step() -> None:
    desk, stolen = robbed(overtime=4.0)
    after, actions = hold(desk, 100)
    # 4 times 5 s from the grant, and both leases at once; it had them for 5 s already.
    assert after is not None and 15 <= after <= 18
    assert overtimes(actions) == [t.rollout for t in stolen]
    assert Cancel((stolen[0].ref,)) in [a.message for a in actions if isinstance(a, Send)]
    assert not any(a.blamed for a in actions if isinstance(a, Ended))
    again = {t.rollout: t for t in granted(actions)}
    assert again.keys() == {t.rollout for t in stolen} and {t.attempt for t in again.values()} == {1}
    holders = {r.generator for r in desk.ledger.book.rollouts.values() if r.number in again}
    assert holders <= {"a", "b"}
    for holder in holders:
        for rollout in list(desk.ledger.peers[holder].held.values()):
            batch = desk.finish(holder, rollout.terms)
    assert Taken in kinds(batch)
    assert "thief" in desk.ledger.peers


def test_without_the_bound_it_would() -> None:
    desk, _ = robbed(overtime=0.0)
    assert hold(desk, 300) == (None, [])


def test_patience_doubles_so_that_a_slow_generator_finishes_in_the_end() -> None:
    desk = Desk(max_lag=0, rollouts_per_step=2, total_steps=4, lease_s=4.0)
    thief = desk.join("thief", 1)
    quick = desk.join("a", 1)
    desk.now += 1
    desk.finish("a", quick[0])
    desk.beat("a", 1)
    desk.send(Take(0))
    waits = []
    for _ in range(4):
        rollout = desk.ledger.book.rollouts[thief[0].rollout]
        since = desk.now - rollout.granted_at
        while rollout.generator == "thief" and rollout.state.name == "HELD":
            desk.now += 0.5
            trickle(desk, "thief", int(10 * desk.now), 1)
            trickle(desk, "a", 0, 1)
            desk.send(Tick())
            assert desk.now < 1000
        waits.append(desk.now - rollout.granted_at if rollout.state.name == "HELD" else since)
        # Its next holder hands it back, so that it comes to the slow one again.
        desk.beat("thief", 1)
        while rollout.generator != "thief":
            desk.now += 2
            desk.send(Failed("a", rollout.ref, "busy", True))
            trickle(desk, "thief", 0, 1)
            desk.send(Tick())
            assert desk.now < 1000
    assert desk.ledger.book.rollouts[thief[0].rollout].overtimes == 4
    started = desk.now
    rollout = desk.ledger.book.rollouts[thief[0].rollout]
    for _ in range(100):  # 4 s * 2 ** 4 = 64 s are its own now
        desk.now += 0.5
        trickle(desk, "thief", int(10 * desk.now), 1)
        trickle(desk, "a", 0, 1)
        desk.send(Tick())
    assert desk.now - started == 50 and rollout.generator == "thief" and rollout.state.name == "HELD"
    assert kinds(desk.finish("thief", rollout.terms))[0].__name__ == "Accepted"


def test_nobody_is_hurried_while_nobody_waits_or_nobody_else_could() -> None:
    desk, _ = robbed(overtime=4.0)
    for name in ("a", "b"):
        desk.beat(name, 0)  # no room
    for second in range(100):
        desk.now += 1
        trickle(desk, "thief", second + 1)
        for name in ("a", "b"):
            desk.beat(name, 0)
        assert not overtimes(desk.send(Tick()))
    idle = Desk(max_lag=0, rollouts_per_step=4, total_steps=4)
    idle.join("thief", 2)
    for term in idle.join("a", 2):
        idle.finish("a", term)
    assert hold(idle, 100) == (None, [])  # the learner is busy: nothing is held up


def test_one_generator_alone_cannot_have_a_prompt_given_up() -> None:
    desk = Desk(max_lag=0, max_attempts=2)
    terms = desk.join("hostile", 1)
    desk.join("honest", 0)
    for attempt in range(10):
        assert [(t.rollout, t.attempt) for t in terms] == [(0, attempt)]
        actions = desk.send(Failed("hostile", terms[0].ref, "no", False))
        assert [bool(a.quarantined) for a in actions if isinstance(a, Ended)] == [False]
        terms = granted(actions)
    # A second opinion settles it.
    desk.beat("hostile", 0)
    desk.send(Failed("hostile", terms[0].ref, "no", False))
    second = desk.beat("honest", 1)
    actions = desk.send(Failed("honest", second[0].ref, "no", False))
    assert [bool(a.quarantined) for a in actions if isinstance(a, Ended)] == [True]


def test_the_setting() -> None:
    assert BrokerConfig(overtime=0).overtime == 0
    with pytest.raises(ConfigError, match="overtime must be 0 or at least 1"):
        BrokerConfig(overtime=0.5)
