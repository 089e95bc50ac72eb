"""kill -9 of the process that holds broker and learner: the run goes on with the same batches, nothing twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from broker_fakes import FakeGenerator
from test_broker import free_port, wait_until

from orz_async.broker.segments import read

HERE = Path(__file__).parent
KILLS = int(os.environ.get("ORZ_TEST_KILLS", "3"))


def test_killed_again_and_again(tmp_path: Path) -> None:
    port = free_port()
    rng = random.Random(0)
    command = [sys.executable, str(HERE / "broker_victim.py"), str(tmp_path), str(port)]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join((str(HERE.parents[1]), str(HERE))))
    taken = tmp_path / "taken"
    with FakeGenerator(f"tcp://127.0.0.1:{port}", "a") as a, FakeGenerator(f"tcp://127.0.0.1:{port}", "b", slots=3):
        for kill in range(KILLS + 1):
            size = taken.stat().st_size if taken.exists() else 0
            victim = subprocess.Popen(command, env=environment)
            try:
                if kill < KILLS:
                    # Let it get somewhere first, or there is nothing to lose.
                    wait_until(lambda size=size: taken.exists() and taken.stat().st_size > size, 20.0)
                    time.sleep(rng.uniform(0.0, 0.08))
                    victim.send_signal(signal.SIGKILL)
                    assert victim.wait() in (-signal.SIGKILL, 0)
                else:
                    assert victim.wait(60) == 0
            finally:
                victim.kill()
                victim.wait()
            if victim.returncode == 0:
                break
        wait_until(lambda: a.bye is not None)
    lines = [line.split() for line in taken.read_text().splitlines()]
    batches = {int(step): (numbers, lag, digest) for step, numbers, lag, digest in lines}
    assert {(int(s), n, lag, d) for s, n, lag, d in lines} == {(s, *rest) for s, rest in batches.items()}, (
        "a step was composed differently after a restart"
    )
    trained = [int(number) for numbers, _, _ in batches.values() for number in numbers.split(",")]
    assert sorted(trained) == list(range(len(trained))) and len(batches) == 40
    assert max(int(lag) for _, lag, _ in batches.values()) <= 2
    funnel = msgspec.json.decode((tmp_path / "funnel").read_bytes())
    assert funnel["trained"] == len(trained) and funnel["in_flight"] == 0
    assert funnel["granted"] == len(trained) + sum(funnel["expired"].values()) + funnel["quarantined"]
    journaled = [t.rollout for t in read(tmp_path / "journal") if t.kind == "train"]
    assert sorted(journaled) == sorted(trained), "the journal holds each rollout once"
