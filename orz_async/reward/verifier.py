"""One verifier process, seen from outside: start it, give it one comparison at a time, end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from enum import Enum, auto
from pathlib import Path
from typing import Literal

import msgspec

from orz_async.reward.grade import Undecided

_WORKER = Path(__file__).with_name("worker.py")
_MAX_REPLY_BYTES = 4096
_READY, _NOTHING = -1, -2
"""Reply numbers: of the greeting, and of no reply at all."""
_CPU_SIGNALS = (-signal.SIGPROF, -signal.SIGXCPU)


class State(Enum):
    """STARTING -> READY <-> BUSY, and any of them -> DEAD, which is final."""

    STARTING = auto()  # importing the algebra system
    READY = auto()
    BUSY = auto()  # one comparison is running
    DEAD = auto()


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: int
    word: Literal["ready", "correct", "wrong", "error"]


_DECODER = msgspec.json.Decoder(Reply)


class Verifier:
    """One process. No method waits: `start` forks, `ask` writes into an empty pipe, `read` takes what is there."""

    def __init__(self, cpu_s: float) -> None:
        self.state = State.DEAD
        self.since = 0.0
        """Monotonic time of the last change of state."""
        self.spoke = False
        """Has it ever become ready?"""
        self._cpu_s = cpu_s
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._expected = _READY

    def start(self) -> None:
        """Its own session, an empty environment, no descriptors but three: nothing to reach, and all of it killable."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_WORKER), str(self._cpu_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            close_fds=True,
            start_new_session=True,
            bufsize=0,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._move(State.STARTING)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def reply_descriptor(self) -> int:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def ask(self, number: int, case: Undecided) -> None:
        """Begin a comparison. A request is smaller than a pipe's buffer and the only one, so writing cannot wait."""
        assert self.state is State.READY and self._process is not None and self._process.stdin is not None
        request = {"id": number, "reference": case.reference, "candidate": case.candidate}
        self._expected = number
        self._move(State.BUSY)
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        except BrokenPipeError:
            # It died while idle: read() sees the end of its output and reports that.
            return

    def read(self) -> Reply | None:
        """The reply that has arrived, if one has. A process that has ended or breaks the protocol becomes DEAD."""
        if self.state is State.DEAD:
            return None
        try:
            data = os.read(self.reply_descriptor, _MAX_REPLY_BYTES)
        except BlockingIOError:
            return None
        if not data:
            # It is ending by itself. Only once it is reaped does its exit status say why, so a slow exit is not killed.
            if self._process is not None and self._process.poll() is not None:
                self.kill()
            return None
        self._buffer += data
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline and len(self._buffer) < _MAX_REPLY_BYTES:
            return None
        try:
            reply = _DECODER.decode(line)
        except msgspec.DecodeError:
            reply = None
        if reply is None or rest or reply.id != self._expected:
            self.kill()
            return None
        self._buffer, self._expected, self.spoke = b"", _NOTHING, True
        self._move(State.READY)
        return reply

    def ended_by_cpu_limit(self) -> bool:
        return self.exit_code in _CPU_SIGNALS

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode if self._process else None

    def kill(self) -> None:
        """SIGKILL to its whole session unless it has ended by itself, and reap it. Idempotent."""
        if self._process is None or self.state is State.DEAD:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._move(State.DEAD)

    def _move(self, state: State) -> None:
        self.state = state
        self.since = time.monotonic()
