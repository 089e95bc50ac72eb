"""No length bias in a real run: what was generated is what was trained, however long it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.conftest import Run
from tests.e2e.journal_check import check_lengths


@pytest.mark.slow  # three more processes that import torch; at lag 0 test_synchronous checks the same
@pytest.mark.timeout(900)
def test_generated_and_trained_lengths_are_the_same(new_run: Callable[..., Run]) -> None:
    run = new_run("lengths", "--steps", "6", "--broker.max-lag", "2", "--broker.window", "1")
    learner = run.learner()
    generators = [run.generator("g0"), run.generator("g1")]
    assert run.finish(learner) == 0, run.log("learner")
    assert all(run.finish(generator) == 0 for generator in generators)
    check_lengths(run, num_rollouts=6 * 32)
    assert max(step["lag_max"] for step in run.steps()) <= 2
