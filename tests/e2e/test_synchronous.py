"""S = 0 is the synchronous algorithm: bit for bit, against a loop that has no broker and against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from orz_async.weights.snapshot import state_digest
from tests.e2e import replay
from tests.e2e.conftest import Run
from tests.e2e.journal_check import check_lengths

STEPS = 4


def synchronous(new_run: Callable[..., Run], name: str) -> Run:
    run = new_run(name, "--steps", str(STEPS), "--broker.max-lag", "0")
    learner = run.learner()
    generator = run.generator("g0")
    assert run.finish(learner) == 0, run.log("learner")
    assert run.finish(generator) == 0, run.log("generator-g0")
    return run


def weights(run_dir: Path) -> str:
    return state_digest(load_file(run_dir / "export" / "model.safetensors"))


def test_equals_a_loop_without_a_broker_and_repeats_itself(new_run: Callable[..., Run]) -> None:
    first, second = synchronous(new_run, "first"), synchronous(new_run, "second")
    reported = [step["losses"] for step in first.steps()]
    assert len(reported) == STEPS
    assert len({loss for step in reported for loss in step["policy"] + step["value"]}) > STEPS, "the losses never move"

    losses, trainer = replay.train(first.folder)
    assert losses == reported
    assert state_digest(dict(trainer.policy.named_parameters())) == weights(first.folder)

    check_lengths(first, num_rollouts=STEPS * 32)
    assert [step["losses"] for step in second.steps()] == reported
    assert weights(second.folder) == weights(first.folder)
    for event in first.steps():
        assert event["lag_max"] == 0
        assert event["mismatch_tokens"] > 0
        assert event["mismatch_max"] <= 1e-5
        assert abs(event["policy"]["ratio_mean"] - 1) < 1e-5
