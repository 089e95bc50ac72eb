"""The simulator: one seed is one history, sound histories pass, and a ledger with a planted bug is found out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from orz_async.broker.book import Book
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Ack, LeaseRef
from orz_async.broker.rollouts import Rollout, State
from orz_async.broker.transitions import Accepted, Ended, Granted, LedgerConfig, Send, Taken, Terms
from orz_async.cli import dispatch
from orz_async.records import Span
from orz_async.sim.clock import Clock
from orz_async.sim.engine import Engine, Sequence
from orz_async.sim.models import WEIGHTS, EngineModel, LearnerModel, LengthModel
from orz_async.sim.oracle import Oracle, Violation
from orz_async.sim.scenarios import large, run_faulty
from orz_async.sim.tasks import Lengths
from orz_async.sim.world import Outcome, Scenario, World

ROOT = Path(__file__).parents[2]
LENGTHS = LengthModel(mean=40.0, spread=0.8, longest=400)


def calm(max_lag: int, window: int = 0, *, steps: int = 12, generators: int = 3, seed: int = 5) -> Outcome:
    """No faults, log-normal lengths, learner and generators about equally fast."""
    ledger = LedgerConfig(
        rollouts_per_step=64, samples_per_prompt=4, max_lag=max_lag, window=window, total_steps=steps, lease_s=1e4
    )
    scenario = Scenario(
        seed=seed,
        ledger=ledger,
        generators=generators,
        engine=EngineModel(slots=16, queue=16, step_s=0.01, row_s=0.001, swap_s=0.02, fetch_s=0.1),
        learner=LearnerModel(policy_s=2e-4, publish_s=0.05, critic_s=2e-4),
        prompt_tokens=10.0,
        status_s=50.0,
    )
    return World(scenario, Lengths(seed, LENGTHS)).run()


def test_one_seed_is_one_history_in_any_process() -> None:
    printed = set()
    for salt in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "orz_async.cli", "sim", "--seed", "7"],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        printed.add(done.stdout)
    assert len(printed) == 1
    assert f"history    {run_faulty(7).hash}" in printed.pop()
    assert run_faulty(8).hash != run_faulty(7).hash


def test_histories_with_faults_keep_every_promise(long: bool) -> None:
    faults: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    restarts = 0
    for seed in range(20_000 if long else 60):
        outcome = run_faulty(seed)
        assert outcome.violation == "", f"seed {seed}"
        faults += outcome.faults
        ended += outcome.ended
        restarts += outcome.restarts
    assert set(faults) == set(WEIGHTS), "a kind of fault never struck"
    assert restarts > 20
    # The others, `left` and `lost`, are rare.
    causes = {"deadline", "silent", "failed", "rejected", "returned", "learner_restart", "quarantined"}
    assert causes <= set(ended)


def first_violation(seeds: int = 40) -> str:
    return next((found for seed in range(seeds) if (found := run_faulty(seed).violation)), "")


def test_a_ledger_that_ignores_the_floor_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both gates: the version that admits a rollout, and the one its generator must serve.
    monkeypatch.setattr(Book, "_limit", lambda book: book.config.total_steps * book.config.rollouts_per_step)
    monkeypatch.setattr(Book, "floor", lambda book, number: 0)
    assert "allowed" in (found := first_violation()) or "too early" in found or "slots" in found, found


def test_a_ledger_that_lends_below_the_floor_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Book, "floor", lambda book, number: 0)
    assert "allowed" in (found := first_violation()), found


def test_a_ledger_that_trains_twice_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Book.publish

    def again(book: Book) -> None:
        rollout = book.rollouts[book.taken[0]]
        publish(book)
        # It comes back as if it had just arrived.
        rollout.state = State.READY
        book.rollouts[rollout.number] = rollout
        book.num_ready += 1
        book._ready.insert(0, rollout.number)

    monkeypatch.setattr(Book, "publish", again)
    assert "second time" in (found := first_violation()) or "raised" in found, found


def test_a_ledger_that_forgets_a_lost_rollout_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Book.end

    def forgetful(book: Book, rollout: Rollout, cause: str, blamed: bool) -> str:
        reason = end(book, rollout, cause, blamed)
        book.lost.remove(rollout.number)
        return reason

    monkeypatch.setattr(Book, "end", forgetful)
    assert "no end after" in (found := first_violation()) or "raised" in found, found


def test_a_ledger_that_composes_anew_after_a_restart_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    restart = Book.restart

    def forgetful(book: Book, lost: tuple[int, ...] = ()) -> list[tuple[Rollout, str]]:
        ended = restart(book, lost)
        book.bound.clear()
        return ended

    monkeypatch.setattr(Book, "restart", forgetful)
    assert "composed anew" in (found := first_violation(120)), found


def test_a_ledger_that_accepts_late_results_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Ledger._answer_stray

    def gullible(ledger: Ledger, generator: str, ref: LeaseRef) -> None:
        rollout = ledger.book.rollouts.get(ref.rollout)
        if ref.kind == "train" and rollout is not None and rollout.attempt > ref.attempt >= 0:
            ledger._out += [Accepted(generator, ref, 0), Send(generator, Ack(ref))]
        else:
            answer(ledger, generator, ref)

    monkeypatch.setattr(Ledger, "_answer_stray", gullible)
    assert "accepted for" in (found := first_violation()), found


@pytest.mark.parametrize("max_lag", [1, 2, 4])
def test_every_lag_is_within_the_bound_and_nothing_is_dropped(max_lag: int) -> None:
    outcome = calm(max_lag, generators=8)
    assert outcome.violation == ""
    assert not outcome.ended, "every granted rollout was trained"
    assert max(outcome.lag_tokens) == max_lag, "fast generators use the lag they are given"
    assert min(outcome.lag_tokens) >= 0
    assert sum(outcome.lag_tokens.values()) == sum(outcome.lengths)


def test_lag_0_is_lock_step() -> None:
    """Every token of step t is of version t; a step takes generation and the policy's part, one after the other."""
    steps, length = 5, 50
    engine = EngineModel(slots=64, queue=0, step_s=0.01, row_s=0.001, swap_s=0.25, fetch_s=0.5)
    learner = LearnerModel(fixed_s=1.0, publish_s=0.5, critic_s=1e-5)
    ledger = LedgerConfig(rollouts_per_step=64, samples_per_prompt=1, max_lag=0, total_steps=steps, lease_s=1e4)
    scenario = Scenario(seed=0, ledger=ledger, generators=1, engine=engine, learner=learner, status_s=1e3)
    outcome = World(scenario, Lengths(0, LengthModel(observed=(length,)))).run()
    assert outcome.violation == ""
    assert outcome.lag_tokens == {0: steps * 64 * length}
    generation = 0.5 + 0.25 + length * (0.01 + 64 * 0.001)
    # The critic's 32 ms hide behind the generation of the next step.
    critic = 1e-5 * 64 * length
    ends = [step * (generation + 1.5) + critic for step in range(1, steps + 1)]
    assert outcome.step_ends == pytest.approx(ends)


def test_a_window_shortens_steps_that_wait_for_stragglers() -> None:
    strict, slack = calm(4), calm(4, window=2)
    assert strict.violation == slack.violation == ""
    assert max(slack.lag_tokens) <= 4
    assert sum(slack.step_waits) <= sum(strict.step_waits)
    assert sorted(slack.lengths) == sorted(strict.lengths)


@pytest.mark.parametrize(("max_lag", "window"), [(0, 0), (2, 0), (3, 2)])
def test_trained_lengths_are_the_generated_ones(max_lag: int, window: int) -> None:
    """No length bias: long rollouts come later, and none is left out."""
    outcome = calm(max_lag, window)
    law = Lengths(5, LENGTHS)
    due = [law.length_of(Terms("train", number, 0, 0, 0, 0)) for number in range(12 * 64)]
    assert outcome.violation == ""
    assert max(due) > 5 * sorted(due)[len(due) // 2], "there are long ones"
    assert sorted(outcome.lengths) == sorted(due)
    if window == 0:
        # Step by step: not even the order of training depends on the length.
        steps = [sorted(outcome.lengths[step * 64 : step * 64 + 64]) for step in range(12)]
        assert steps == [sorted(due[step * 64 : step * 64 + 64]) for step in range(12)]


def test_many_generators() -> None:
    scenario, tasks = large(0, generators=300, steps=4, rollouts=256)
    outcome = World(scenario, tasks).run()
    assert outcome.violation == ""
    assert len(outcome.lengths) == 4 * 256
    assert outcome.hash == World(*large(0, generators=300, steps=4, rollouts=256)).run().hash


def test_engine_gives_every_sequence_its_tokens() -> None:
    """Two rows of 10 and 30 tokens, a third that waits for a slot, a swap on the way."""
    clock = Clock()
    ended: list[tuple[int, float, tuple[Span, ...]]] = []

    def done(sequence: Sequence, spans: tuple[Span, ...]) -> None:
        ended.append((sequence.work.rollout, clock.now, spans))

    engine = Engine(EngineModel(slots=2, step_s=1.0, row_s=0.5, swap_s=3.0), clock, 0.0, done)
    engine.swap(4)
    clock.now = 3.0  # the swap of an idle engine takes its time too
    for number, length in enumerate((10, 30, 5)):
        terms = Terms("train", number, 0, 0, 0, 0)
        engine.submit(terms, terms.ref, length)
    clock.at(3.0 + 2.0 * 12, engine.swap, 5)
    clock.run(1e9)
    # Two rows: 2 s a token. Row 0 ends after 10 tokens, row 2 takes its slot; the swap is at level 12 and takes 3 s.
    assert [(number, time) for number, time, _ in ended] == [(0, 23.0), (2, 36.0), (1, 36.0 + 15 * 1.5)]
    assert [spans for _, _, spans in ended] == [
        (Span(4, 0),),
        (Span(4, 0), Span(5, 2)),
        (Span(4, 0), Span(5, 12)),
    ]
    assert engine.tokens == pytest.approx(45)


def test_oracle_objects() -> None:
    config = LedgerConfig(rollouts_per_step=1, samples_per_prompt=1, max_lag=1, total_steps=4)
    ref = LeaseRef("train", 0, 0)
    grant = Granted("a", (Terms("train", 0, 0, 0, 0, 0),))

    def oracle(*entries: Granted | Accepted | Ended | Taken) -> Oracle:
        made = Oracle(config, remember=True)
        for entry in entries:
            made.entry(entry)
        return made

    accepted, taken = Accepted("a", ref, 0), Taken(0, (0,))
    with pytest.raises(Violation, match="while a holds it"):
        oracle(grant, grant)
    with pytest.raises(Violation, match="ended for a, but None"):
        oracle(grant, accepted, Ended("a", ref, "deadline", True, ""))
    with pytest.raises(Violation, match="accepted for b, but a holds it"):
        oracle(grant, Accepted("b", ref, 0))
    with pytest.raises(Violation, match="nobody delivered"):
        oracle(grant, taken)
    with pytest.raises(Violation, match="beyond the last step"):
        oracle(Granted("a", (Terms("train", 4, 0, 0, 0, 0),)))
    sound = oracle(grant, accepted, taken)
    sound.trained(taken, [(3, (Span(0, 0),))])
    with pytest.raises(Violation, match="composed anew"):
        sound.entry(Taken(0, (1,)))
    with pytest.raises(Violation, match="second time"):
        sound.trained(Taken(1, (0,)), [(3, (Span(0, 0),))])
    with pytest.raises(Violation, match="lag 2, 1 allowed"):
        stale = oracle(grant)
        stale.weights = [(1,), (2,)]
        stale.trained(Taken(2, (0,)), [(3, (Span(0, 0), Span(2, 1)))])


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["sim", "--seeds", "5"]) == 0
    printed = capsys.readouterr().out
    assert "5 histories" in printed
    assert "violations 0" in printed
    assert dispatch(["sim", "--scale", "--generators", "20", "--steps", "2", "--rollouts", "64"]) == 0
    printed = capsys.readouterr().out
    assert "20 generators, 2 steps of 64 rollouts (simulated)" in printed
    assert "violation  none" in printed


def test_command_reports_violations(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Book, "floor", lambda book, number: 0)
    assert dispatch(["sim", "--seeds", "20"]) == 1
    assert "repeats it" in capsys.readouterr().out
