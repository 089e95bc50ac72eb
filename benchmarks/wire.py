"""The wire: trajectories of 8,192 tokens from many generators on loopback through the real broker to `take`.

The broker runs in this process, as it does in the learner; the generators are connections of one other process, so that
on two cores the broker is what is measured. Each variant trains `steps` batches with nothing done between them.

trajectories/s, MB/s   from the first batch to the last
broker_us              CPU time of the broker's thread for one trajectory, journal writes included
io_us                  the same of ZeroMQ's thread (TCP, framing, decryption)
load_us                the same of the generators' process, encryption included
load_average           of the machine: with more than its cores, the rates are shared with others, the CPU times less so
8192_rollouts_s        what the broker's thread takes from a learner step of Open-Reasoner-Zero's size
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.protocol import Row, row
from orz_async.broker import server
from orz_async.broker.journal import Journal
from orz_async.broker.segments import Record
from orz_async.config import (
    BrokerConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    JournalConfig,
    SamplingConfig,
)
from orz_async.keys.ring import Keyring
from orz_async.observe.events import EventLog
from orz_async.records import Prompt, int32_bytes

TOKENS = 8192
PROMPT_TOKENS = 256
VOCAB = 151_936
BATCH = 512
STEPS = 6
OUTSTANDING = 768
"""Leases over all generators."""
ORZ_ROLLOUTS = 8192
_PROMPT = int32_bytes(np.arange(PROMPT_TOKENS))


class _Prompts:
    def prompt(self, index: int) -> Prompt:
        return Prompt(f"prompt-{index}", _PROMPT, "42")


class _NoJournal(Journal):
    """Counts records and keeps nothing."""

    def append(self, record: Record, encoded: memoryview | None = None) -> int:
        self.next_index += 1
        return self.next_index


def _config(run_dir: Path, keys: str, fsync: str) -> Config:
    return Config(
        run_dir=str(run_dir),
        steps=10_000,
        data=DataConfig(max_prompt_tokens=PROMPT_TOKENS),
        sampling=SamplingConfig(max_new_tokens=TOKENS),
        broker=BrokerConfig(prompts_per_step=BATCH // 8, samples_per_prompt=8, max_lag=1, keys=keys),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=1),
        journal=JournalConfig(fsync=fsync),  # type: ignore[arg-type]
    )


def _cpu_seconds(load: int) -> dict[str, float]:
    """By thread: the broker's by its id, ZeroMQ's by their names; and of the process with the generators."""
    found = {"load": _seconds(Path(f"/proc/{load}"))}
    for task in Path("/proc/self/task").iterdir():
        kind = "io" if (task / "comm").read_text().startswith("ZMQbg/IO") else f"thread-{task.name}"
        found[kind] = found.get(kind, 0.0) + _seconds(task)
    return found


def _seconds(task: Path) -> float:
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _serving(run_dir: Path, keys: str, journal: str) -> Iterator[server.Broker]:
    fsync = "none" if journal == "no" else journal
    with patch.object(server, "Journal", _NoJournal if journal == "no" else Journal):
        broker = server.Broker(
            config=_config(run_dir, keys, fsync),
            run_dir=run_dir,
            run_id="wire",
            epoch=1,
            prompts=_Prompts(),
            heldout=[],
            weights_address="tcp://127.0.0.1:1",
            model_path="model",
            vocab_size=VOCAB,
            events=EventLog.disabled(),
            start=None,
        )
        broker.start()
    try:
        yield broker
    finally:
        broker.close(finished=True, reason="measured")


def measure(generators: int, *, curve: bool, journal: str, steps: int = STEPS) -> dict[str, float]:
    """One variant: trajectories/s, microseconds of CPU a trajectory by thread."""
    with tempfile.TemporaryDirectory(prefix="orz-wire-") as folder:
        run_dir = Path(folder)
        keys, argument = "", []
        if curve:
            keys = str(run_dir / "keys")
            argument = [str(Keyring(Path(keys)).new("load", "generator"))]
        with _serving(run_dir, keys, journal) as broker:
            assert broker._thread is not None and broker._thread.native_id is not None
            thread = f"thread-{broker._thread.native_id}"
            slots = max(4, OUTSTANDING // generators)
            command = [sys.executable, "-m", "benchmarks.wire_load", broker.address]
            command += [*map(str, (generators, slots, TOKENS, VOCAB)), *argument]
            load = subprocess.Popen(command)
            try:
                broker.published(0)
                broker.take(0)
                broker.published(1)
                before, started = _cpu_seconds(load.pid), time.perf_counter()
                num_bytes = 0
                for step in range(1, steps + 1):
                    batch = broker.take(step)
                    num_bytes += sum(len(t.response) + len(t.logprobs) + len(t.prompt) for t in batch)
                    broker.published(step + 1)
                    broker.snapshot()
                    broker.checkpointed(step + 1)
                seconds, after = time.perf_counter() - started, _cpu_seconds(load.pid)
            finally:
                broker.close(finished=True, reason="measured")
                load.wait(timeout=30)
    count = BATCH * steps
    broker_us, io_us, load_us = (1e6 * (after[name] - before[name]) / count for name in (thread, "io", "load"))
    return {
        "trajectories_s": count / seconds,
        "MB_s": num_bytes / seconds / 1e6,
        "broker_us": broker_us,
        "io_us": io_us,
        "load_us": load_us,
        "load_average": os.getloadavg()[0],
        "8192_rollouts_s": broker_us * ORZ_ROLLOUTS / 1e6,
    }


VARIANTS = {
    f"{n} generators, {'CURVE' if curve else 'plain'}, {'journal ' + journal if journal != 'no' else 'no journal'}": (
        n,
        curve,
        journal,
    )
    for n in (1, 8, 64)
    for curve in (False, True)
    for journal in ("no", "interval")
}


def run(repeats: int = 3) -> list[Row]:
    """All variants in turn, `repeats` times over."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for variant, (n, curve, journal) in VARIANTS.items():
            for name, value in measure(n, curve=curve, journal=journal).items():
                found.setdefault((name, variant), []).append(value)
            print(f"{variant:<44} {found['trajectories_s', variant][-1]:8.0f}/s", flush=True)
    units = {"trajectories_s": "1/s", "MB_s": "MB/s", "8192_rollouts_s": "s", "load_average": "runs"}
    return [row(f"wire_{name}", variant, units.get(name, "us"), values) for (name, variant), values in found.items()]


if __name__ == "__main__":
    words = sys.argv[1:] or ["8", "plain", "no"]
    print(measure(int(words[0]), curve=words[1] == "curve", journal=words[2], steps=int((words[3:] or ["6"])[0])))
