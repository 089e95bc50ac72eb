"""A run whose sinks are missing, shut out and killed trains what a loop without anything around it trains."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

from tests.e2e import replay
from tests.e2e.conftest import Run, wait_for


def test_broken_sinks_leave_training_untouched(new_run: Callable[..., Run]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = new_run(
            "run",
            *("--steps", "4", "--broker.max-lag", "0", "--observe.sink-queue", "1"),
            *("--observe.prometheus", f"127.0.0.1:{port}", "--observe.trackio", "nowhere"),
        )
        learner = run.learner()
        generator = run.generator("g0")
        [started] = wait_for(lambda: run.events("learner-0", "sinks_started"), "the sinks' start")
        failures = wait_for(lambda: {e["name"] for e in run.events("sinks", "sink") if e["failure"]}, "a failure")
        assert failures <= {"prometheus", "trackio"}
        os.kill(started["pid"], signal.SIGKILL)
        assert run.finish(learner) == 0, run.log("learner")
        assert run.finish(generator) == 0, run.log("generator-g0")
    reported = [step["losses"] for step in run.steps()]
    assert len(reported) == 4
    assert replay.train(run.folder)[0] == reported
