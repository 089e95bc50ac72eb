"""kill -9 of anything: the run finishes, nothing is lost or trained twice, no token is older than the bound."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from orz_async.broker.segments import records
from orz_async.broker.transitions import Granted
from orz_async.broker.verify import verify
from orz_async.config_toml import load
from orz_async.records import Trajectory
from tests.e2e import replay
from tests.e2e.conftest import Run, wait_for

STEPS = 12


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def frozen_at_work(run: Run, process: subprocess.Popen[bytes]) -> bool:
    """Stop the daemon called "doomed"; let it go on if it holds no lease, by what the journal says."""
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.1)  # for what it sent before
    held: set[tuple[str, int, int]] = set()
    for _, record, _ in records(run.folder / "journal"):
        if isinstance(record, Granted) and record.generator == "doomed":
            held |= {(terms.kind, terms.rollout, terms.attempt) for terms in record.terms}
        elif isinstance(record, Trajectory):
            held -= {(record.kind, record.rollout, record.attempt)}
    if not held:
        os.kill(process.pid, signal.SIGCONT)
    return bool(held)


def check_books(run: Run) -> None:
    """Every granted rollout ended exactly once, and each number was trained exactly once."""
    config = load(run.folder / "config.toml")
    last = run.events("broker", "funnel")[-1]
    expired = sum(last["expired"].values())
    assert last["trained"] == STEPS * config.broker.rollouts_per_step
    assert last["in_flight"] == 0
    assert last["granted"] == last["trained"] + expired + last["quarantined"] + last["in_flight"]
    assert [step["step"] for step in run.steps()] == list(range(STEPS))
    assert all(step["lag_max"] <= config.broker.max_lag for step in run.steps())
    verified = verify(run.folder)
    assert (verified.findings, verified.trained, verified.in_flight) == ([], last["trained"], 0)
    assert [len(batch) for batch in replay.batches(config, run.folder)] == [config.broker.rollouts_per_step] * STEPS


def test_two_ranks_lose_a_daemon_and_gain_one(new_run: Callable[..., Run]) -> None:
    run = new_run("run", "--steps", str(STEPS), "--broker.max-lag", "1", "--broker.lease-s", "4")
    learner = run.learner(ranks=2)
    doomed, survivor = run.generator("doomed"), run.generator("survivor")
    wait_for(lambda: len(run.steps()) >= 2, "two steps")
    wait_for(lambda: frozen_at_work(run, doomed), "the doomed one to hold leases when it freezes")
    os.kill(survivor.pid, signal.SIGSTOP)  # so that the run cannot end before the third is there
    kill(doomed)
    late = run.generator("late")
    wait_for(lambda: any(e["rollouts"] for e in run.events("generator-late", "throughput")), "work for the third")
    os.kill(survivor.pid, signal.SIGCONT)
    assert run.finish(learner) == 0, run.log("learner")
    assert run.finish(survivor) == 0, run.log("generator-survivor")
    assert run.finish(late) == 0, run.log("generator-late")
    check_books(run)
    assert any(event["generator"] == "doomed" for event in run.events("broker", "expired")), "the death cost no lease"

    # What two ranks did, one rank does too.
    losses, _ = replay.train(run.folder)
    for ours, theirs in zip(losses, (step["losses"] for step in run.steps()), strict=True):
        assert ours["policy"] == pytest.approx(theirs["policy"], rel=1e-6, abs=1e-6)
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-6, abs=1e-6)


def test_a_killed_learner_resumes_with_the_same_rollouts(new_run: Callable[..., Run]) -> None:
    run = new_run("run", "--steps", str(STEPS), "--broker.max-lag", "1", "--checkpoint.every", "3")
    learner = run.learner()
    generators = [run.generator("g0"), run.generator("g1")]
    wait_for(lambda: len(run.steps()) >= 5, "five steps")
    kill(learner)
    before = {step["step"]: step["losses"] for step in run.steps()}
    learner = run.learner()
    assert run.finish(learner) == 0, run.log("learner")
    for name, generator in zip(("g0", "g1"), generators, strict=True):
        assert run.finish(generator) == 0, run.log(f"generator-{name}")
    check_books(run)
    restarts = run.events("learner-0", "run")
    assert [event["resumed_step"] for event in restarts] == [None, 3]
    repeated = {step["step"]: step["losses"] for step in run.steps() if step["step"] in before}
    assert repeated == before, "the steps after the checkpoint were trained on other rollouts, or otherwise"
    # The whole run, killed in the middle, is bit for bit the run that nobody killed.
    losses, _ = replay.train(run.folder)
    assert losses == [step["losses"] for step in run.steps()]
