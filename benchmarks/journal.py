"""The journal alone: trajectories of 8,192 tokens written under each fsync policy, and read back whole.

append   rollouts/s until all are durable as the policy means it, written in turns of some records as the broker's
         thread does; MB/s is in the notes
replay   rollouts/s of reading them again with every checksum verified, as a resumed learner does; the files are in the
         operating system's cache, so this is the cost of the code, not of the disk
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np

from benchmarks.protocol import Row, row
from orz_async.broker.journal import Journal
from orz_async.broker.segments import read
from orz_async.broker.wire import run_hash
from orz_async.config import JournalConfig
from orz_async.records import Span, Trajectory, float32_bytes, int32_bytes

TOKENS = 8192
RECORDS = 1024
A_TURN = 16
"""Records between two writes; with fsync "each" also between two waits for the disk."""
POLICIES: tuple[str, ...] = get_args(get_type_hints(JournalConfig)["fsync"])


def trajectory(number: int) -> Trajectory:
    rng = np.random.default_rng(number)
    return Trajectory(
        kind="train",
        rollout=number,
        attempt=0,
        prompt_id=str(number // 8),
        sample=number % 8,
        prompt=int32_bytes(rng.integers(0, 150_000, 256)),
        response=int32_bytes(rng.integers(0, 150_000, TOKENS)),
        logprobs=float32_bytes(-rng.random(TOKENS)),
        spans=(Span(0, 0),),
        reward=1.0,
        finish="stop",
        verdict="correct",
        generator="g0",
        generate_s=1.0,
    )


def append(folder: Path, policy: str, made: list[Trajectory]) -> float:
    """Seconds until all are durable."""
    journal = Journal(folder, run_hash("benchmark"), JournalConfig(fsync=policy))  # type: ignore[arg-type]
    journal.open()
    started = time.perf_counter()
    for number, one in enumerate(made, 1):
        journal.append(one)
        journal.ease()
        if number % A_TURN == 0:
            journal.write(time.monotonic())
    journal.close()
    return time.perf_counter() - started


def replay(folder: Path, expected: int) -> float:
    """Seconds to read everything back. RuntimeError if it is not everything."""
    started = time.perf_counter()
    found = sum(1 for _ in read(folder))
    if found != expected:
        raise RuntimeError(f"expected {expected} trajectories in the journal just written, found {found}")
    return time.perf_counter() - started


def run(repeats: int = 5, num_records: int = RECORDS) -> list[Row]:
    """All policies in turn, each followed by a replay of what it wrote."""
    made = [trajectory(number) for number in range(num_records)]
    seconds: dict[tuple[str, str], list[float]] = {}
    size = 0
    for _ in range(repeats):
        for policy in POLICIES:
            with tempfile.TemporaryDirectory(prefix="orz-journal-") as name:
                folder = Path(name)
                seconds.setdefault(("append", f"fsync {policy}"), []).append(append(folder, policy, made))
                size = sum(path.stat().st_size for path in folder.iterdir())
                seconds.setdefault(("replay", "checksums verified"), []).append(replay(folder, num_records))
    return [
        row(
            f"journal {what}",
            variant,
            "rollouts/s",
            [num_records / s for s in values],
            MB_s=size / 1e6 / statistics.median(values),
            tokens=TOKENS,
        )
        for (what, variant), values in seconds.items()
    ]


if __name__ == "__main__":
    print(run(*map(int, sys.argv[1:])))
