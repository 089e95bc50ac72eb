"""The generator daemons of this machine: started when the learner listens, restarted when they die, or given up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orz_async.errors import ExitCode
from orz_async.launcher.children import Child
from orz_async.launcher.commands import Command
from orz_async.launcher.limits import Limits
from orz_async.observe.process import read_records

FUTILE = {ExitCode.CONFIG, ExitCode.MODEL, ExitCode.DATA}
"""Exit codes that another attempt with the same command would end with again."""


@dataclass(slots=True)
class Daemon:
    """One daemon: running, or due for a start, or gone for good."""

    command: Command
    child: Child | None = None
    started: float = 0.0
    due: float | None = 0.0
    """When to start it next; None: never again."""
    restarts: int = 0
    failure: tuple[int, str] | None = None
    """Exit code and last words, once it is given up."""
    news: tuple[float, str] | None = None
    """When to say it, and what. Daemons end moments before their learner does, and then only its end is news."""


class Generators:
    """Keeps the daemons of one machine alive; `watch` is called often and never waits.

    A daemon that exits 0 left on purpose (somebody sent it SIGTERM, or the run is over) and is not started again.
    """

    def __init__(self, commands: Sequence[Command], logs: Path, limits: Limits, note: Callable[[str], None]) -> None:
        self._daemons = [Daemon(command) for command in commands]
        self._logs = logs
        self._limits = limits
        self._note = note
        self._address = ""
        self._may_start = False

    def start_early(self) -> None:
        """Start before the learner listens: they load their libraries meanwhile and wait for its address to appear."""
        self._may_start = True

    def connect(self, address: str) -> None:
        """The learner listens here. Daemons that were sent elsewhere are stopped and started anew."""
        if self._address not in ("", address):
            self._note(f"the learner listens on another address now ({address}): restarting the generators")
            for daemon in self._daemons:
                if daemon.child is not None:
                    daemon.child.kill()  # its leases died with the learner: there is nothing to hand back
                    daemon.child, daemon.due = None, 0.0
        self._address, self._may_start = address, True

    def watch(self) -> None:
        """Start what is due and notice what died."""
        for daemon in self._daemons:
            now = time.monotonic()
            if daemon.child is not None and daemon.child.poll() is not None:
                self._ended(daemon, daemon.child)
            if daemon.news is not None and daemon.news[0] <= now:
                self._note(daemon.news[1])
                daemon.news = None
            if daemon.child is None and daemon.due is not None and daemon.due <= now and self._may_start:
                daemon.child = Child(daemon.command, self._logs)
                daemon.started = time.monotonic()

    def _ended(self, daemon: Daemon, child: Child) -> None:
        code, daemon.child, daemon.due = child.poll(), None, None
        name = daemon.command.name
        now = time.monotonic()
        if code == 0:
            daemon.news = (now + self._limits.leave_s, f"{name} left on purpose; it is not started again")
            return
        assert code is not None
        words = "\n".join(record.message for record in read_records(self._logs, name)) or child.last_words()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if now - daemon.started >= self._limits.healthy_s:
            daemon.restarts = 0
        if code in FUTILE or daemon.restarts >= self._limits.generator_restarts:
            why = "would end so again" if code in FUTILE else f"after {daemon.restarts} restarts in a row"
            daemon.failure = (code, f"{name} {how} and is given up ({why}):\n{words}")
            self._note(daemon.failure[1])
            return
        daemon.restarts += 1
        wait = self._limits.backoff(daemon.restarts)
        daemon.due = now + wait
        count = f"restart {daemon.restarts} of at most {self._limits.generator_restarts} in a row"
        said = f"{name} {how}; starting it again after {wait:g} s ({count})" + (f":\n{words}" if code > 0 else "")
        daemon.news = (daemon.due, said)

    @property
    def all_failed(self) -> tuple[int, str] | None:
        """Exit code and words of the first failure, when no daemon is left and none left on purpose."""
        failures = [daemon.failure for daemon in self._daemons]
        return failures[0] if all(failures) else None

    def running(self) -> list[Child]:
        return [daemon.child for daemon in self._daemons if daemon.child is not None and daemon.child.poll() is None]

    def pids(self) -> set[int]:
        return {daemon.child.pid for daemon in self._daemons if daemon.child is not None}

    def leave(self, *, told: bool, hurry: Callable[[], bool]) -> None:
        """Wait until all are gone: after SIGTERM, in the end after SIGKILL.

        `told`: the broker has told them that the run is complete, so SIGTERM waits a little. `hurry` ends all waiting.
        """
        if told:
            self._wait(self._limits.leave_s, hurry)
        # Twice: the second tells a daemon not to finish what it generates, for which nobody waits any more.
        for seconds in (self._limits.leave_s, self._limits.stop_s):
            for child in self.running():
                child.send(signal.SIGTERM)
            self._wait(seconds, hurry)
        for child in self.running():
            self._note(f"{child.command.name} did not end after SIGTERM: killing it")
        self.kill()

    def _wait(self, seconds: float, hurry: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while self.running() and time.monotonic() < until and not hurry():
            time.sleep(self._limits.poll_s)

    def kill(self) -> None:
        for daemon in self._daemons:
            daemon.due = None
            if daemon.child is not None:
                daemon.child.kill()
