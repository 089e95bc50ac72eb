"""`python -m orz_async.observe.sinks RUN`: follow the event logs of a run until standard input ends."""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

from orz_async.config_toml import load
from orz_async.observe.events import EventLog
from orz_async.observe.sinks.feed import Feed, close_all
from orz_async.observe.sinks.scalars import Scalars
from orz_async.observe.sinks.writers import configured
from orz_async.observe.tail import Tail

POLL_S = 1.0
REPORT_S = 10.0
PATIENCE_S = 15.0
"""At the end, for all sinks together."""


def follow(run_dir: Path) -> None:
    """Whoever started this holds the other end of standard input; when it is closed or dead, the rest is delivered."""
    config = load(run_dir / "config.toml")
    log = EventLog(run_dir / "events" / "sinks.jsonl", "sinks")
    makers = configured(config, run_dir)
    feeds = [Feed(name, make, config.observe.sink_queue) for name, make in makers.items()]
    tail, scalars, due, ended = Tail(run_dir / "events"), Scalars(), 0.0, False
    _skip_history(tail, scalars)
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], POLL_S)[0])
        for event in tail.poll():
            if (point := scalars.point(event)) is not None:
                for feed in feeds:
                    feed.offer(point)
        if time.monotonic() >= due:
            due = time.monotonic() + REPORT_S
            _report(log, feeds)
    close_all(feeds, PATIENCE_S)
    _report(log, feeds)
    log.close()


def _skip_history(tail: Tail, scalars: Scalars) -> None:
    """A resumed run has delivered its past already."""
    started = time.time()
    for event in tail.poll():
        if event["t"] < started:
            scalars.point(event)


def _report(log: EventLog, feeds: list[Feed]) -> None:
    for feed in feeds:
        log.emit("sink", name=feed.name, delivered=feed.delivered, dropped=feed.dropped, failure=feed.failure)


if __name__ == "__main__":
    follow(Path(sys.argv[1]))
    # Not sys.exit: a service that hangs in a thread or at exit must not keep this process.
    os._exit(0)
