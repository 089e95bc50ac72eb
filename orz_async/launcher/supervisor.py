"""Keeps one run alive until it is finished, stopped or beyond help."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from orz_async.errors import ExitCode
from orz_async.launcher.children import Child, adopt_orphans, children_of, kill_orphans
from orz_async.launcher.commands import Commands
from orz_async.launcher.generators import Generators
from orz_async.launcher.limits import Limits
from orz_async.observe.history import LEARNER
from orz_async.observe.live import View
from orz_async.observe.process import read_records

SAME_CTRL_C_S = 0.5
"""Signals closer than this are one request: `timeout` and some shells send theirs twice."""

REPEATED = "steps since the last checkpoint are repeated when the run is resumed"


class Phase(Enum):
    RUNNING = auto()  # the learner runs, or is due for a restart
    DRAINING = auto()  # it was asked to save and end; what the run ends with is known
    OVER = auto()  # only the ending of processes is left


class Outcome(NamedTuple):
    code: int
    message: str


@dataclass(slots=True)
class Signals:
    """Requests to stop; the handler only counts."""

    requests: int = 0
    last: float = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requests or now - self.last > SAME_CTRL_C_S:
            self.requests += 1
        self.last = now

    @contextmanager
    def installed(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # nohup ignores SIGHUP for us; that stays.
        before = {n: signal.signal(n, self.handle) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Supervisor:
    """One run on one machine.

    consumes  exits and exit records of the children, RUN/address, signals
    produces  the children and their restarts, notes and pictures in the view, an Outcome
    waits for nothing longer than limits.poll_s, except the children's end, which limits bound
    ends      when the learner has ended for good, or a second signal came; then everything it started has ended too
    """

    def __init__(self, commands: Commands, run_dir: Path, view: View, limits: Limits) -> None:
        self._commands = commands
        self._run_dir = run_dir
        self._logs = run_dir / "logs"
        self._view = view
        self._limits = limits
        self._signals = Signals()
        self._generators = Generators(commands.generators, self._logs, limits, view.note)
        self._phase = Phase.RUNNING
        self._outcome = Outcome(ExitCode.INTERNAL, "")
        self._learner: Child | None = None
        self._learner_due = self._learner_started = 0.0
        self._silence_said = False
        self._restarts = 0
        self._steps_at_restart = -1
        self._address_file = run_dir / "address"
        self._address_mark = self._mark()
        self._drain_until = self._remind_at = 0.0
        self._not_ours: set[int] = set()

    def run(self) -> Outcome:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._not_ours = set(children_of(os.getpid()))
        adopt_orphans()
        if not self._address_file.exists():  # else it is of an earlier life, and may not be where this one will listen
            self._generators.start_early()
        with self._signals.installed():
            try:
                while self._phase is not Phase.OVER:
                    self._watch_signals()
                    self._watch_learner()
                    self._watch_generators()
                    self._view.update()
                    time.sleep(self._limits.poll_s)
            finally:
                self._end_all()
        return self._outcome

    def _over(self, code: int, message: str) -> None:
        self._phase, self._outcome = Phase.OVER, Outcome(int(code), message)

    def _end_all(self) -> None:
        if self._learner is not None:
            self._learner.kill()  # it has ended, or must
        if self._phase is Phase.OVER:
            told = self._outcome.code == ExitCode.OK
            self._generators.leave(told=told, hurry=lambda: self._signals.requests >= 2)
        self._generators.kill()
        kill_orphans(self._not_ours)

    # Signals and draining.

    def _watch_signals(self) -> None:
        if self._signals.requests >= 2:
            self._over(ExitCode.INTERRUPTED, f"left at once; {REPEATED}")
        elif self._signals.requests == 1 and self._phase is Phase.RUNNING:
            bound = f"for {self._limits.drain_s:g} s at most"
            self._view.note(f"stopping: the learner finishes its step and saves, {bound}; once more to leave at once")
            self._drain(
                self._limits.drain_s, Outcome(ExitCode.INTERRUPTED, "stopped; the same command continues the run")
            )
        elif self._phase is Phase.DRAINING:
            self._watch_drain()

    def _drain(self, seconds: float, outcome: Outcome) -> None:
        """Ask the learner to save and end; the run then ends with this outcome."""
        if self._learner is None:
            self._over(*outcome)
            return
        self._phase, self._outcome = Phase.DRAINING, outcome
        now = time.monotonic()
        self._drain_until, self._remind_at = now + seconds, now + self._limits.remind_s
        self._learner.send_workers(signal.SIGTERM)

    def _watch_drain(self) -> None:
        now = time.monotonic()
        if now >= self._drain_until:
            late = "expected the learner to save and end in time (--drain-s), found it still running and killed it"
            self._over(self._outcome.code, f"{self._outcome.message}\n{late}; {REPEATED}")
        elif now >= self._remind_at:
            self._remind_at = now + self._limits.remind_s
            self._view.note(f"waiting for the learner to save, {self._drain_until - now:.0f} s at most")

    # The learner.

    def _watch_learner(self) -> None:
        if self._phase is Phase.OVER:
            return
        if self._learner is None:
            if time.monotonic() >= self._learner_due:
                self._address_mark = self._mark()
                self._learner = Child(self._commands.learner, self._logs)
                self._learner_started = time.time()
        elif (code := self._learner.poll()) is not None:
            kill_orphans(self._not_ours | self._generators.pids())
            self._learner_ended(self._learner, code)
        else:
            self._watch_silence(self._learner)

    def _watch_silence(self, learner: Child) -> None:
        """A frozen learner is a wait too: it is bounded, and what is awaited, from whom and since when is said."""
        heard = self._view.history.processes.get(LEARNER)
        if heard is None or heard.seen < self._learner_started:
            return
        quiet = time.time() - heard.seen
        if quiet < self._limits.silent_note_s:
            self._silence_said = False
        elif quiet >= self._limits.silent_s:
            self._view.note(f"the learner has written nothing for {quiet:.0f} s: killing it")
            learner.kill()
        elif not self._silence_said:
            self._silence_said = True
            learner.send_workers(signal.SIGUSR1)
            since = f"no event for {quiet:.0f} s, killed and resumed after {self._limits.silent_s:g} s"
            self._view.note(f"waiting for a sign of life from the learner (pid {learner.pid}): {since}; {learner.log}")

    def _learner_ended(self, learner: Child, code: int) -> None:
        records = read_records(self._logs, learner.command.name)
        failures = [r for r in records if r.code not in (ExitCode.OK, ExitCode.INTERRUPTED)]
        number = learner.killed_by()
        if code == 0:
            # It may have finished while it was asked to stop.
            self._over(*(self._outcome if self._phase is Phase.DRAINING else Outcome(ExitCode.OK, "")))
        elif number is not None and self._phase is Phase.RUNNING:
            self._learner_killed(learner, number)
        elif failures:
            words = f"\n{learner.last_words()}" if failures[0].code == ExitCode.INTERNAL else ""
            self._over(failures[0].code, f"{failures[0].message}{words}")
        elif self._phase is Phase.DRAINING:
            self._over(
                self._outcome.code, self._outcome.message + ("" if records else f"\nit could not save; {REPEATED}")
            )
        elif records:
            self._over(ExitCode.INTERRUPTED, "the learner was stopped and saved; the same command continues the run")
        else:
            self._over(
                code, f"the learner ended with exit code {code} and its last words were:\n{learner.last_words()}"
            )

    def _learner_killed(self, learner: Child, number: int) -> None:
        steps = self._view.read().steps_done
        if steps > self._steps_at_restart:
            self._restarts = 0
        most = self._limits.learner_restarts
        if self._restarts >= most:
            found = f"the learner was killed by signal {number}, after {most} restarts without a finished step between"
            self._over(ExitCode.INTERNAL, f"{found}; if it is 9, is memory short? Last words:\n{learner.last_words()}")
            return
        self._restarts, self._steps_at_restart = self._restarts + 1, steps
        wait = self._limits.backoff(self._restarts)
        self._learner, self._learner_due = None, time.monotonic() + wait
        count = f"restart {self._restarts} of at most {most} without a finished step between"
        self._view.note(
            f"the learner was killed by signal {number} after {steps} steps; resuming in {wait:g} s ({count})"
        )

    # The generators.

    def _mark(self) -> tuple[int, int]:
        """Changes whenever the learner writes its address anew, also with the same text."""
        try:
            status = self._address_file.stat()
        except FileNotFoundError:
            return (0, 0)
        return (status.st_ino, status.st_mtime_ns)

    def _watch_generators(self) -> None:
        if self._phase is not Phase.RUNNING:
            return
        if (mark := self._mark()) != self._address_mark:
            self._address_mark = mark
            self._generators.connect(self._address_file.read_text().strip())
        self._generators.watch()
        if failure := self._generators.all_failed:
            message = f"expected a running generator, found that none is left: {failure[1]}"
            self._view.note("no generator is left: the learner saves and ends")
            self._drain(min(self._limits.drain_s, self._limits.drain_alone_s), Outcome(failure[0], message))
