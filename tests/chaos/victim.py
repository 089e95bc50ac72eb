"""`python -m tests.chaos.victim [--die POINT[:N]] [--kilobytes] [--weights-via FILE:ADDRESS] RECIPE ...`

The real learner. At the N-th time it reaches the named point it sends itself SIGKILL; nothing else is changed, but:
--kilobytes makes the journal's megabytes kilobytes, so that files and limits are reached in seconds, and --weights-via
writes the publisher's address to FILE and tells generators to fetch from ADDRESS, where a proxy listens.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orz_async.broker import journal
from orz_async.broker.server import Broker
from orz_async.cli_config import parse_config
from orz_async.learner import checkpoint, start
from orz_async.learner.loop import Learner
from orz_async.learner.trainer import Trainer
from orz_async.observe.process import run_main
from orz_async.weights.stream import StreamPublisher

# What is wrapped, and whether it dies before or after the call.
POINTS: dict[str, tuple[Any, str, str]] = {
    "start-epoch": (start, "begin_epoch", "after"),
    "start-recovered": (Broker, "_recover", "after"),
    "after-take": (Learner, "learn", "before"),
    "after-values": (Trainer, "update_policy", "before"),
    "before-publish": (StreamPublisher, "publish", "before"),
    "weights-out": (Broker, "published", "before"),
    "after-publish": (Trainer, "update_critic", "before"),
    "before-checkpoint": (Learner, "save", "before"),
    "checkpoint-tensors": (checkpoint, "_write", "before"),
    "checkpoint-files": (checkpoint, "_sha256", "after"),
    "checkpoint-rename": (checkpoint, "_move", "before"),
    "checkpoint-renamed": (checkpoint, "_move", "after"),
    "checkpoint-prune": (checkpoint, "_prune", "before"),
    "checkpoint-pruning": (checkpoint, "_aside", "after"),
    "after-checkpoint": (Learner, "collect_evaluations", "before"),
    "journal-segment": (journal.Journal, "_begin_segment", "after"),
}
SPECIAL = ("journal-append", "journal-retention")
"""Half of a write reaches the file; of the files that may go, one is gone."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(times: int) -> Callable[[], None]:
    left = [times]

    def reached() -> None:
        left[0] -= 1
        if left[0] <= 0:
            die()

    return reached


def arm(point: str, times: int) -> None:
    reached = counted(times)
    if point == "journal-append":
        write = journal._write
        left = [times]

        def half(file: int, parts: Sequence[bytes | memoryview]) -> None:
            data = b"".join(parts)
            left[0] -= len(data) > 200  # not the header of a file
            if left[0] <= 0:
                os.write(file, data[: len(data) // 2])
                die()
            write(file, parts)

        journal._write = half
        return
    if point == "journal-retention":
        gone = counted(2 * times)
        sys.addaudithook(
            lambda event, args: gone() if event == "os.remove" and str(args[0]).endswith(".orzj") else None
        )
        return
    owner, name, when = POINTS[point]
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            reached()
        result = original(*args, **kwargs)
        if when == "after":
            reached()
        return result

    setattr(owner, name, wrapped)


def detour(file: Path, address: str) -> None:
    begin = StreamPublisher.__init__

    def through_proxy(self: StreamPublisher, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        part = file.with_suffix(".part")
        part.write_text(self.address)
        part.rename(file)
        self.address = address

    StreamPublisher.__init__ = through_proxy  # type: ignore[method-assign]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--die", default="")
    options.add_argument("--kilobytes", action="store_true")
    options.add_argument("--weights-via", default="")
    given, rest = options.parse_known_args()
    if given.kilobytes:
        journal._MB = 1 << 10
    if given.weights_via:
        file, _, address = given.weights_via.partition("@")
        detour(Path(file), address)
    if given.die:
        point, _, times = given.die.partition(":")
        arm(point, int(times or 1))
    start.start(parse_config(rest))


if __name__ == "__main__":
    run_main(main, process="learner-0")
