"""Every bound of the supervisor, in one place, with what happens behind it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    drain_s: float = 300.0
    """After the first Ctrl-C the learner may finish its step and save for this long; then everything is killed."""
    drain_alone_s: float = 30.0
    """The same when no generator is left: the step under way cannot be finished."""
    leave_s: float = 5.0
    """After a finished run the generators, told so by the broker, may leave by themselves for this long; and again
    between a first and a second SIGTERM."""
    stop_s: float = 10.0
    """Between the second SIGTERM and SIGKILL of a generator."""
    silent_note_s: float = 60.0
    """A learner writes an event every second from a thread of its own. Silent for this long it is said to be, and asked
    for its stacks (SIGUSR1)."""
    silent_s: float = 900.0
    """Silent for this long it hangs: it is killed and restarted like one that was killed by somebody else."""
    learner_restarts: int = 3
    """Restarts of a killed learner in a row without a finished step between them; then the run ends."""
    generator_restarts: int = 5
    """Restarts of one daemon in a row; then it stays away, and the run goes on with the others."""
    healthy_s: float = 300.0
    """A daemon that lived this long starts counting its restarts anew."""
    backoff_s: float = 1.0
    """Before the first restart; it doubles with each one in a row."""
    backoff_most_s: float = 30.0
    poll_s: float = 0.1
    """Between two looks at children and signals."""
    remind_s: float = 5.0
    """Between two lines that say what a drain waits for."""

    def backoff(self, restarts: int) -> float:
        """Seconds before restart number `restarts`, from 1."""
        return min(self.backoff_most_s, self.backoff_s * float(2 ** min(restarts - 1, 16)))
