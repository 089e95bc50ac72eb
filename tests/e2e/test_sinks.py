"""A run whose sinks are missing, shut out and killed trains what a loop without anything around it trains; and what its
report says is what its journal holds."""

from __future__ import annotations

import os
import signal
import socket
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orz_async.broker.segments import read
from orz_async.observe.tokens import read_tokens
from orz_async.report.page import read_run, report
from orz_async.report.rollouts import choose
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
    check_report(run.folder)


def check_report(folder: Path) -> None:
    numbers, model = read_run(folder)
    batches = defaultdict(list)
    for trajectory in read(folder / "journal"):
        if trajectory.kind == "train":
            batches[trajectory.rollout // numbers["rollouts_per_step"]].append(trajectory)
    series, steps = numbers["series"], numbers["summary"]["steps"]
    assert series["step"] == list(range(1, steps + 1))
    rewards = [np.mean([t.reward for t in batches[step]]) for step in range(steps)]
    lengths = [np.mean([t.num_response_tokens for t in batches[step]]) for step in range(steps)]
    assert series["reward"] == pytest.approx(rewards, rel=1e-6)
    assert series["length"] == pytest.approx(lengths, rel=1e-6)
    assert numbers["funnel"]["trained"] == sum(len(batches[step]) for step in range(steps))
    assert sum(numbers["lag_histogram"].values()) == series["tokens"][-1]
    sample = choose(folder, numbers["funnel"]["granted"], model)
    with_values = sum(sample["rows"]["values"])
    assert with_values == sum(1 for tokens in read_tokens(folder / "tokens") for _ in tokens.columns()) > 0
    _, told = report([folder], folder / "report.html")
    assert (folder / "report.html").stat().st_size > 50_000 and f"{with_values} with values" in " ".join(told)
