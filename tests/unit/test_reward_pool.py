"""Verifier processes: what they decide, what they survive, and that killing them loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orz_async.reward import worker
from orz_async.reward.grade import Verdict
from orz_async.reward.pool import GraderPool
from orz_async.reward.verifier import State, Verifier

CORRECT, WRONG = Verdict(1.0, "correct"), Verdict(0.0, "wrong")
# A hundredth power of a sum of four variables: expanding it would need gigabytes.
EXPLOSION = "((x+y+z+w)^{99})^{99}+1"


@pytest.fixture
def pool() -> Iterator[GraderPool[int]]:
    pool = GraderPool[int](1, spares=0)
    yield pool
    pool.close()


def respond(box: str) -> str:
    return f"</think><answer>\\boxed{{{box}}}</answer>"


def drain(pool: GraderPool[int]) -> dict[int, Verdict]:
    verdicts: dict[int, Verdict] = {}
    limit = time.monotonic() + 60
    while pool.pending:
        assert time.monotonic() < limit, f"{pool.pending} cases still pending"
        for key, verdict in pool.poll(timeout_s=1.0):
            assert key not in verdicts, "a verdict came twice"
            verdicts[key] = verdict
    return verdicts


def busy_pid(pool: GraderPool[int]) -> int:
    """Process id of the verifier that is comparing, as soon as there is one."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        assert pool.poll(timeout_s=0.01) == [] or pool.pending
        for verifier in pool._fleet:
            if verifier.state is State.BUSY and verifier.pid is not None:
                return verifier.pid
    raise AssertionError("no verifier became busy")


def test_no_process_is_started_for_what_the_exact_rules_settle(pool: GraderPool[int]) -> None:
    pool.submit(0, respond("8"), "8", "stop")
    pool.submit(1, respond("b;7"), "8", "stop")
    pool.submit(2, "a2=2;", "8", "length")
    assert pool.pending == 3
    assert dict(pool.poll()) == {0: CORRECT, 1: WRONG, 2: Verdict(0.0, "truncated")}
    assert (pool.pending, pool.started) == (0, 0)


def test_verifiers_decide_and_outlive_a_runaway_answer() -> None:
    pool = GraderPool[int](1, spares=1)
    cases = [("2\\sqrt{3}", "\\sqrt{12}"), ("5", EXPLOSION), ("x^2+2x+1", "(x+1)^2"), ("5x", "5"), ("1 2", "12")]
    for key, (reference, candidate) in enumerate(cases):
        pool.submit(key, respond(candidate), reference, "stop")
    assert drain(pool) == {0: CORRECT, 1: Verdict(0.0, "timeout"), 2: CORRECT, 3: WRONG, 4: WRONG}
    # One in use, one spare, and one in the place of the one that ran away.
    assert pool.started == 3
    pool.close()


def test_a_verifier_killed_from_outside_is_replaced_and_its_case_repeated(pool: GraderPool[int]) -> None:
    pool.submit(0, respond(EXPLOSION), "5", "stop")
    pool.submit(1, respond("\\sqrt{12}"), "2\\sqrt{3}", "stop")
    os.kill(busy_pid(pool), signal.SIGKILL)
    assert drain(pool) == {0: Verdict(0.0, "timeout"), 1: CORRECT}


def test_a_case_that_outlives_three_processes_is_an_error(pool: GraderPool[int]) -> None:
    pool.submit(0, respond(EXPLOSION), "5", "stop")
    killed: set[int] = set()
    while len(killed) < 3:
        pid = busy_pid(pool)
        if pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    assert drain(pool) == {0: Verdict(0.0, "error")}


def test_the_deadline_is_cpu_time_so_that_a_frozen_machine_changes_no_reward(pool: GraderPool[int]) -> None:
    pool.submit(0, respond("\\sin(x)^2+\\cos(x)^2"), "1", "stop")
    pid = busy_pid(pool)
    os.kill(pid, signal.SIGSTOP)
    assert pool.poll(timeout_s=1.5) == []  # longer than the deadline, without using any of it
    os.kill(pid, signal.SIGCONT)
    assert drain(pool) == {0: CORRECT}


def test_close_leaves_no_process_and_may_be_repeated(pool: GraderPool[int]) -> None:
    pool.submit(0, respond(EXPLOSION), "5", "stop")
    busy_pid(pool)
    pids = [verifier.pid for verifier in pool._fleet]
    pool.close()
    pool.close()
    for pid in pids:
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_submit_is_bounded() -> None:
    pool = GraderPool[int](1, capacity=2)
    pool.submit(0, respond("8"), "8", "stop")
    pool.submit(1, respond("8"), "8", "stop")
    with pytest.raises(RuntimeError, match="at most 2 ungraded"):
        pool.submit(2, respond("8"), "8", "stop")


def test_a_verifier_is_confined() -> None:
    """A session of its own, nothing in its environment, its three pipes and the limits of worker.py."""
    secret = os.open(Path(__file__), os.O_RDONLY)
    os.set_inheritable(secret, True)
    verifier = Verifier(1.0)
    verifier.start()
    try:
        limit = time.monotonic() + 60
        while verifier.state is State.STARTING:
            assert time.monotonic() < limit
            verifier.read()
            time.sleep(0.01)
        assert verifier.state is State.READY and verifier.pid is not None
        proc = Path("/proc") / str(verifier.pid)
        assert os.getsid(verifier.pid) == verifier.pid != os.getsid(0)
        names = {entry.split(b"=")[0] for entry in (proc / "environ").read_bytes().split(b"\0") if entry}
        assert names <= {b"LC_CTYPE"}  # the interpreter sets this one itself
        targets = [str(entry.readlink()) for entry in (proc / "fd").iterdir()]
        assert sorted(target.split(":")[0] for target in targets) == [
            "/dev/null",
            "/dev/null",
            "/dev/null",
            "pipe",
            "pipe",
        ]
        limits = (proc / "limits").read_text()
        for name, value in (
            ("address space", worker.MEMORY_BYTES),
            ("open files", worker.OPEN_FILES),
            ("file size", 0),
        ):
            row = next(line for line in limits.splitlines() if line.startswith(f"Max {name}"))
            assert row.split()[3] == str(value), row
    finally:
        verifier.kill()
        os.close(secret)


MEMORY_BOMB = """
import io, runpy, sys
module = runpy.run_path(sys.argv[1])
module["limit_resources"]()
def compare(reference, candidate):
    return bool(bytearray(900 << 20))
module["serve"].__globals__["load_compare"] = lambda: compare
replies = io.BytesIO()
module["serve"](io.BytesIO(b'{"id": 7, "reference": "1", "candidate": "2"}\\n'), replies, 1.0)
print(replies.getvalue().decode())
"""


def test_an_answer_that_asks_for_900_megabytes_is_an_error_of_its_own() -> None:
    output = subprocess.run(
        [sys.executable, "-c", MEMORY_BOMB, worker.__file__], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert output.splitlines()[:2] == ['{"id": -1, "word": "ready"}', '{"id": 7, "word": "error"}']
