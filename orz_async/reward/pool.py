"""Grades many responses at once without ever waiting for one.

Most answers are settled in process by `grade`. The rest are compared by verifier processes, which are started when
the first such answer comes and not before.

What a reward must not depend on is how busy this machine is, so the deadline of a comparison is CPU time of its
process, enforced by the kernel. Wall-clock time only ends a process that stands still, and then its case is tried
again elsewhere.
"""

from __future__ import annotations

import select
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from orz_async.errors import ConfigError
from orz_async.records import Finish
from orz_async.reward.grade import Undecided, Verdict, grade, settled
from orz_async.reward.verifier import State, Verifier

Key = TypeVar("Key")

CPU_S = 1.0
"""CPU seconds one comparison may take."""
STUCK_S = 120.0
"""Wall-clock seconds after which a busy or starting process is taken for frozen. No sane machine reaches this."""
ATTEMPTS = 3
"""Processes a case may outlive without a verdict (killed from outside, crashed, frozen) before it is an "error"."""
FAILED_STARTS = 3


@dataclass(slots=True)
class _Case(Generic[Key]):
    key: Key
    question: Undecided
    attempts: int = 0


class GraderPool(Generic[Key]):
    """Non-blocking grader.

    consumes  responses by submit()
    produces  (key, verdict) by poll(), each key once, in no particular order
    ends      by close(), which kills what runs; cases still pending are dropped
    """

    def __init__(self, workers: int = 1, *, spares: int = 1, cpu_s: float = CPU_S, capacity: int = 65_536) -> None:
        self._workers = workers
        self._spares = spares
        self._cpu_s = cpu_s
        self._capacity = capacity
        self._graded: list[tuple[Key, Verdict]] = []
        self._waiting: deque[_Case[Key]] = deque()
        self._running: dict[Verifier, _Case[Key]] = {}
        self._fleet: list[Verifier] = []
        self._failed_starts = 0
        self._asked = 0
        self.started = 0
        """Processes started so far."""

    @property
    def pending(self) -> int:
        """Submitted and not yet returned by poll()."""
        return len(self._graded) + len(self._waiting) + len(self._running)

    def submit(self, key: Key, response: str, answer: str, finish: Finish) -> None:
        """Take one finished response; its verdict comes from a later poll()."""
        if self.pending >= self._capacity:
            raise RuntimeError(f"expected at most {self._capacity} ungraded responses, found one more; poll() first")
        outcome = grade(response, answer, finish)
        if isinstance(outcome, Verdict):
            self._graded.append((key, outcome))
        else:
            self._waiting.append(_Case(key, outcome))
            self._advance()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Key, Verdict]]:
        """All verdicts reached since the last call; with a timeout, wait that long for a first one."""
        deadline = time.monotonic() + timeout_s
        self._advance()
        while not self._graded and (self._waiting or self._running) and (left := deadline - time.monotonic()) > 0:
            # Woken by a reply or an exit; the short limit is for one that has closed its pipe and is not reaped yet.
            descriptors = [verifier.reply_descriptor for verifier in self._fleet]
            select.select(descriptors, [], [], min(left, 0.05))
            self._advance()
        graded, self._graded = self._graded, []
        return graded

    def close(self) -> None:
        """Kill all processes. Idempotent."""
        for verifier in self._fleet:
            verifier.kill()
        self._fleet.clear()
        self._running.clear()
        self._waiting.clear()

    def _advance(self) -> None:
        """Collect replies, bury the dead, start processes, hand out cases."""
        for verifier in self._fleet:
            self._collect(verifier)
        for verifier in [one for one in self._fleet if one.state is State.DEAD]:
            self._bury(verifier)
        if self._waiting or self._running:
            while len(self._fleet) < self._workers + self._spares:
                verifier = Verifier(self._cpu_s)
                self._fleet.append(verifier)
                verifier.start()
                self.started += 1
        for verifier in self._fleet:
            if self._waiting and verifier.state is State.READY and len(self._running) < self._workers:
                case = self._waiting.popleft()
                self._running[verifier] = case
                self._asked += 1
                verifier.ask(self._asked, case.question)

    def _collect(self, verifier: Verifier) -> None:
        reply = verifier.read()
        if reply is None:
            if verifier.state in (State.STARTING, State.BUSY) and time.monotonic() - verifier.since > STUCK_S:
                verifier.kill()
            return
        self._failed_starts = 0
        if (case := self._running.pop(verifier, None)) is not None:
            verdict = Verdict(0.0, "error") if reply.word == "error" else settled(reply.word == "correct")
            self._graded.append((case.key, verdict))

    def _bury(self, verifier: Verifier) -> None:
        self._fleet.remove(verifier)
        case = self._running.pop(verifier, None)
        if not verifier.spoke:
            self._failed_starts += 1
            if self._failed_starts >= FAILED_STARTS:
                self.close()
                raise ConfigError(
                    f"expected the verifier processes to start, found {FAILED_STARTS} that ended before they were "
                    f"ready (exit code {verifier.exit_code}); check the installation: python -c 'import math_verify'"
                )
        if case is None:
            return
        case.attempts += 1
        if verifier.ended_by_cpu_limit():
            self._graded.append((case.key, Verdict(0.0, "timeout")))
        elif case.attempts >= ATTEMPTS:
            self._graded.append((case.key, Verdict(0.0, "error")))
        else:
            self._waiting.appendleft(case)
