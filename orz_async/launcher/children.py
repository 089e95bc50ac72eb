"""Child processes that cannot outlive us, and what can be known of them without talking to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from orz_async.launcher.commands import Command
from orz_async.observe.process import EXIT_DIR, LAUNCHER, die_with_parent, record_paths

_PR_SET_CHILD_SUBREAPER = 36
TAIL_BYTES = 16384

_TORCHRUN_REPORT = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic/", re.MULTILINE)
_ROOT_CAUSE = re.compile(r"Root Cause.*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


def _bound_to(parent: int) -> Callable[[], None]:
    def bind() -> None:
        # Runs between fork and exec. The kernel kills this process when the launcher's main thread ends; if that
        # happened before the request, nobody will, so look once.
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)

    return bind


class Child:
    """One process of the run, in a session of its own: a Ctrl-C at the terminal reaches it only through us."""

    def __init__(self, command: Command, logs: Path) -> None:
        self.command = command
        self.log = logs / f"{command.name}.log"
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        env = (
            os.environ | dict(command.env) | {"PYTHONUNBUFFERED": "1", EXIT_DIR: str(logs), LAUNCHER: str(os.getpid())}
        )
        for record in record_paths(logs, command.name):
            record.unlink()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                preexec_fn=_bound_to(os.getpid()),  # noqa: PLW1509 - the launcher has one thread
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            self._process.send_signal(number)

    def send_workers(self, number: signal.Signals) -> None:
        """Signal what this process started instead of itself.

        torchrun would pass SIGTERM on and then kill its workers after 30 s, which is too short to save a large model;
        asked directly, the workers take the time they need and torchrun ends with them.
        """
        workers = children_of(self.pid)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)
        if not workers:
            self.send(number)

    def kill(self) -> None:
        """SIGKILL it, its group, and the sessions its children made."""
        below = descendants(self.pid)
        for group in (self.pid, *below):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def output(self) -> str:
        """The end of what it printed since it was started."""
        size = self.log.stat().st_size
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, size - TAIL_BYTES))
            return log.read(TAIL_BYTES).decode(errors="replace")

    def last_words(self, lines: int = 15) -> str:
        """The last lines of its log, without torchrun's report about itself."""
        report = _TORCHRUN_REPORT.search(text := self.output())
        return "\n".join(f"  | {line}" for line in text[: report.start() if report else None].splitlines()[-lines:])

    def killed_by(self) -> int | None:
        """The signal that ended it, or the first of its workers as torchrun reports it; None if it ended by itself.

        First, because torchrun ends the other workers by signals too.
        """
        code = self.poll()
        if code is None or code == 0:
            return None
        if code < 0:
            return -code
        cause = _ROOT_CAUSE.search(self.output())
        return -int(cause[1]) if cause and int(cause[1]) < 0 else None


def adopt_orphans() -> None:
    """From now on the children of a child that dies become ours, so that they can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_orphans(known: set[int]) -> None:
    """SIGKILL and reap every child of this process that is not in `known`."""
    for pid in set(children_of(os.getpid())) - known:
        for orphan in (*descendants(pid), pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _parents() -> dict[int, int]:
    """pid -> parent of every process that can be seen. Empty where there is no /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it ended while we looked
            found[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    return found


def children_of(pid: int) -> list[int]:
    return [child for child, parent in _parents().items() if parent == pid]


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, nearest first."""
    parents, found = _parents(), [pid]
    for ancestor in found:
        found.extend(child for child, parent in parents.items() if parent == ancestor)
    return found[1:]
