"""Each way of the weights, chosen by configuration, under real daemons; one of them is killed on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orz_async.errors import ExitCode
from tests.e2e.conftest import Run, wait_for

STEPS = 10_000
"""More than are made: the test ends the run when it has seen enough."""


def fetched(run: Run, generator: str) -> list[dict[str, Any]]:
    return run.events(f"generator-{generator}", "weights")


@pytest.mark.parametrize(
    "transport",
    ["relays", "keyed", pytest.param("nccl", marks=pytest.mark.slow), pytest.param("file", marks=pytest.mark.slow)],
)
def test_a_run_over_it_loses_a_generator_and_goes_on(
    new_run: Callable[..., Run], tmp_path: Path, transport: str
) -> None:
    relays = transport in ("relays", "keyed")
    way = "stream" if relays else transport
    # Then every connection is encrypted and proves a key, those to a relay too.
    keys = ("--broker.keys", str(tmp_path / "keys")) if transport == "keyed" else ()
    run = new_run(transport, "--steps", str(STEPS), "--weights.transport", way, "--broker.lease-s", "4", *keys)
    learner = run.learner()
    relay = ("--relay", "tcp://127.0.0.1:0") if relays else ()
    first = run.generator("first", *relay)
    wait_for(lambda: fetched(run, "first"), "weights of the first generator")
    run.generator("second", *relay)
    wait_for(lambda: fetched(run, "second"), "weights of the second generator")
    if relays:
        name = "local.first" if keys else "first"  # whoever has a key has its name
        address = next(event["relay"] for event in run.events("broker", "joined") if event["generator"] == name)
        assert address
        # On a busy machine the first one may have been given up for a while: then the learner serves the second.
        through = wait_for(lambda: [e for e in fetched(run, "second") if e["source"] == address], "weights by relay")
        assert through[0]["checksum_ok"]
    os.killpg(first.pid, signal.SIGKILL)
    before = len(fetched(run, "second"))
    wait_for(lambda: len(fetched(run, "second")) > before + 2, "versions after the death of the first generator")
    learner.send_signal(signal.SIGTERM)
    assert run.finish(learner) == ExitCode.INTERRUPTED, run.log("learner")
    assert all(event["checksum_ok"] for event in fetched(run, "second"))
    assert [step["step"] for step in run.steps()] == list(range(len(run.steps())))
    if transport == "nccl":
        expelled = run.events("learner-0", "weights_expelled")
        assert [event["member"].rpartition(":")[2] for event in expelled] in ([], [str(first.pid)])
