"""The launcher around small real processes: signals, restarts, typed ends, and nobody left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from orz_async.launcher.limits import Limits

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "unit" / "launcher_fakes.py"
QUICK = {"drain_s": 10.0, "leave_s": 0.2, "stop_s": 5.0, "backoff_s": 0.05, "poll_s": 0.02}


class Launched:
    """A launcher in a process of its own."""

    def __init__(self, run: Path, learner: str, generator: str, count: int, limits: dict[str, Any]) -> None:
        self.run = run
        bounds = msgspec.json.encode(msgspec.convert(QUICK | limits, Limits)).decode()
        argv = [sys.executable, str(FAKES), "launcher", str(run), learner, generator, str(count), bounds]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(argv, env=env, stdout=-1, stderr=-2, text=True, start_new_session=True)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, f"waited 30 s for {what}; alive: {self.alive()}"
            assert self.process.poll() is None or condition(), f"the launcher ended before {what}"
            time.sleep(0.01)

    def until_there(self, *names: str) -> None:
        for name in names:
            self.until((self.run / name).exists, name)

    def lives(self, name: str) -> int:
        path = self.run / f"lives-{name}"
        return path.stat().st_size if path.exists() else 0

    def end(self) -> tuple[int, str]:
        """(exit code, everything printed), after asserting that nothing is left."""
        output, _ = self.process.communicate(timeout=40)
        assert self.alive() == []
        return self.process.returncode, output

    def alive(self) -> list[str]:
        """Processes of this run that still exist, zombies aside, the launcher left out."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if str(self.run) in words and "launcher" not in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(words))
        return found


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[Launched] = []

    def start(learner: str, generator: str = "serve", count: int = 1, **limits: Any) -> Launched:
        started.append(Launched(tmp_path / "run", learner, generator, count, limits))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        launched.process.communicate()


def test_a_finished_learner_ends_the_run_and_the_generators_drain(launch: Launch) -> None:
    launched = launch("finish", count=2)
    code, output = launched.end()
    assert code == 0, output
    assert "outcome 0" in output
    assert (launched.run / "left-g0").exists()
    assert (launched.run / "address-g1").read_text().startswith("tcp://127.0.0.1:")
    assert {p.name for p in (launched.run / "logs").glob("*.log")} == {
        *("learner.log", "generator-g0.log", "generator-g1.log")
    }


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ("typed", 8, "expected a finite loss, found nan; lower learner.lr"),
        ("early-typed", 2, "run `orz make-base`"),
        ("bug", 1, "  | ZeroDivisionError: a mistake of ours"),
    ],
)
def test_a_typed_exit_of_the_learner_is_the_exit_of_the_run(
    launch: Launch, behaviour: str, code: int, words: str
) -> None:
    launched = launch(behaviour)
    found, output = launched.end()
    assert found == code, output
    assert words in output
    assert "torch/distributed" not in output
    assert launched.lives("learner") == 1


def test_a_killed_learner_is_restarted_and_generators_follow_it(launch: Launch) -> None:
    launched = launch("die-once")
    code, output = launched.end()
    assert code == 0, output
    assert launched.lives("learner") == 2
    assert "killed by signal 9 after 0 steps; resuming in 0.05 s (restart 1 of at most 3" in output
    assert "the learner listens on another address now" in output
    assert (launched.run / "address-g0").read_text() == (launched.run / "address").read_text()


def test_a_learner_that_freezes_is_asked_then_killed_and_resumed(launch: Launch) -> None:
    launched = launch("freeze-once", silent_note_s=0.5, silent_s=2.0)
    code, output = launched.end()
    assert code == 0, output
    assert launched.lives("learner") == 2
    assert "waiting for a sign of life from the learner" in output
    assert "killing it" in output


def test_a_learner_that_is_killed_again_and_again_ends_the_run(launch: Launch) -> None:
    launched = launch("die-always", learner_restarts=2)
    code, output = launched.end()
    assert code == 1, output
    assert launched.lives("learner") == 3
    assert "after 2 restarts without a finished step" in output


def test_steps_between_two_deaths_renew_the_restarts(launch: Launch) -> None:
    launched = launch("die-stepping", learner_restarts=1)
    launched.until(lambda: launched.lives("learner") >= 4, "the fourth life")
    launched.process.send_signal(signal.SIGINT)
    assert launched.end()[0] == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops(launch: Launch, number: signal.Signals) -> None:
    launched = launch("drain", remind_s=0.05)
    launched.until_there("learner-waits", "working-g0")
    launched.process.send_signal(number)
    time.sleep(0.1)
    launched.process.send_signal(number)  # `timeout` and some shells send theirs twice
    code, output = launched.end()
    assert code == 130, output
    assert (launched.run / "saved").exists()
    assert (launched.run / "left-g0").exists()
    assert "waiting for the learner to save" in output
    assert "the same command continues the run" in output


def test_the_second_signal_leaves_at_once(launch: Launch) -> None:
    launched = launch("stubborn", "stubborn")
    launched.until_there("learner-waits")
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    launched.process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    code, output = launched.end()
    assert code == 130, output
    assert time.monotonic() - sent < 4.0
    assert "left at once" in output


def test_a_learner_that_does_not_save_in_time_is_killed(launch: Launch) -> None:
    launched = launch("stubborn", drain_s=0.3)
    launched.until_there("learner-waits")
    launched.process.send_signal(signal.SIGTERM)
    code, output = launched.end()
    assert code == 130, output
    assert "found it still running and killed it" in output


def test_a_generator_that_does_not_leave_is_killed(launch: Launch) -> None:
    launched = launch("finish", "stubborn", stop_s=0.3)
    code, output = launched.end()
    assert code == 0, output
    assert "did not end after SIGTERM: killing it" in output


def test_a_killed_generator_is_restarted(launch: Launch) -> None:
    launched = launch("finish", "die-once")
    code, output = launched.end()
    assert code == 0, output
    assert launched.lives("g0") == 2
    assert (
        "generator-g0 was killed by signal 9; starting it again after 0.05 s (restart 1 of at most 5 in a row)"
        in output
    )


def test_generators_that_die_for_ever_end_the_run_after_the_learner_saved(launch: Launch) -> None:
    launched = launch("drain", "serve", count=2, generator_restarts=2)
    launched.until_there("learner-waits", "working-g1")
    until = time.monotonic() + 30
    while launched.process.poll() is None and time.monotonic() < until:
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if str(launched.run) in words and "generator" in words:
                process.kill()
        time.sleep(0.02)
    code, output = launched.end()
    assert code == 256 - 9, output
    assert re.search(r"generator-g\d was killed by signal 9 and is given up \(after 2 restarts in a row\)", output)
    assert "expected a running generator, found that none is left" in output
    assert (launched.run / "saved").exists()


def test_a_generator_with_a_futile_error_is_not_restarted(launch: Launch) -> None:
    launched = launch("drain", "refuse")
    code, output = launched.end()
    assert code == 2, output
    assert launched.lives("g0") == 1
    assert "run `orz make-base`" in output


def test_a_generator_that_left_on_purpose_stays_away(launch: Launch) -> None:
    launched = launch("drain", "leave")
    launched.until_there("learner-waits", "working-g0")
    time.sleep(1.0)
    launched.process.send_signal(signal.SIGINT)
    code, output = launched.end()
    assert code == 130, output
    assert launched.lives("g0") == 1
    assert "generator-g0 left on purpose" in output


def test_kill_9_of_the_launcher_takes_everybody_along(launch: Launch) -> None:
    launched = launch("stubborn", "stubborn", count=2)
    launched.until_there("learner-waits", "working-g0", "working-g1")
    assert len(launched.alive()) == 4  # torchrun, its worker, two generators
    launched.process.kill()
    launched.process.wait()
    end = time.monotonic() + 5
    while launched.alive() and time.monotonic() < end:
        time.sleep(0.02)
    assert launched.alive() == []


def test_what_outlived_torchrun_is_ended_before_the_restart(launch: Launch) -> None:
    launched = launch("stubborn-with-helper")
    launched.until_there("learner-waits")
    assert sum("helper" in line.split() for line in launched.alive()) == 1
    agent = next(
        p for p in psutil.process_iter(["cmdline"]) if {"torchrun", str(launched.run)} <= set(p.info["cmdline"] or [])
    )
    agent.kill()
    launched.until(lambda: launched.lives("learner") == 2, "the restart")
    assert sum("learner" in line.split() for line in launched.alive()) == 1
    assert sum("helper" in line.split() for line in launched.alive()) <= 1
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    launched.process.send_signal(signal.SIGINT)
    assert launched.end()[0] == 130


def test_the_same_through_the_real_torchrun(launch: Launch) -> None:
    launched = launch("real-torchrun-die-then-typed")
    code, output = launched.end()
    assert launched.lives("learner") == 2, output
    assert code == 8, output
    assert "expected a finite loss, found nan; lower learner.lr" in output
