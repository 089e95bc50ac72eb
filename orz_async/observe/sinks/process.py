"""The learner's end of the sinks: a process is started and let go; nothing is ever waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orz_async.config import ObserveConfig
from orz_async.observe.events import EventLog


def wanted(observe: ObserveConfig) -> bool:
    return bool(observe.tensorboard or observe.wandb or observe.trackio or observe.prometheus)


@contextmanager
def sinks(observe: ObserveConfig, run_dir: Path, events: EventLog) -> Iterator[None]:
    """Inside the block the sinks follow the run's event logs; after it they deliver the rest and end by themselves.

    They also do if this process is killed: their standard input ends with it. What they print is in RUN/logs/sinks.log.
    """
    process = _start(run_dir, events) if wanted(observe) else None
    try:
        yield
    finally:
        if process is not None and process.stdin is not None:
            process.stdin.close()
            # Reaped when it ends, by nobody who has anything else to do.
            threading.Thread(target=process.wait, name="sinks-reaper", daemon=True).start()


def _start(run_dir: Path, events: EventLog) -> subprocess.Popen[bytes] | None:
    command = [sys.executable, "-m", "orz_async.observe.sinks", str(run_dir)]
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        with (run_dir / "logs" / "sinks.log").open("ab") as log:
            # A session of its own: Ctrl-C is for the learner, which may still have steps to report.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=_quiet()
            )
    except OSError as error:
        events.emit("sink", name="all", delivered=0, dropped=0, failure=f"not started: {error}")
        return None
    events.emit("sinks_started", pid=process.pid)
    return process


def _quiet() -> dict[str, str]:
    """Without the learner's ranks and threads: a library that looks at them would wait for the other ranks."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ORZ_LAUNCHER", "ORZ_EXIT_DIR")
    return {name: value for name, value in os.environ.items() if name not in own}
