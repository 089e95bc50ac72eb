"""Held-out evaluations of a run: avg@k and pass@k against counting, rows of problems, and where they are shown."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import learner_kit as kit
import msgspec
import numpy as np
import pytest

from orz_async.learner.evaluations import evaluation_fields, problem_rows, write_rows
from orz_async.observe.summary import evaluation
from orz_async.records import Trajectory

RIGHT = {"p0": [1, 0, 0, 0], "p1": [1, 1, 0, 1], "p2": [0, 0, 0, 0], "p3": [1, 1, 1, 1], "p4": [0, 1, 1, 0, 1]}
"""p4 was sampled once more than the others."""


def trajectories() -> list[Trajectory]:
    rng, numbers = np.random.default_rng(0), itertools.count()
    made = [
        msgspec.structs.replace(
            kit.trajectory(rng, next(numbers)),
            kind="eval",
            prompt_id=prompt,
            sample=sample,
            reward=float(right),
            verdict="correct" if right else "wrong",
        )
        for prompt, rewards in RIGHT.items()
        for sample, right in enumerate(rewards)
    ]
    return [made[n] for n in rng.permutation(len(made))]  # they arrive in any order


def counted(k: int) -> float:
    """pass@k by going through all ways to take k of the samples."""
    shares = []
    for rewards in RIGHT.values():
        draws = list(itertools.combinations(rewards, k))
        shares.append(sum(any(draw) for draw in draws) / len(draws))
    return sum(shares) / len(shares)


def test_averages_and_passes_are_those_of_counting() -> None:
    fields = evaluation_fields(7, trajectories())
    assert (fields["version"], fields["problems"], fields["samples"], fields["rollouts"]) == (7, 5, 4, 21)
    assert list(fields["pass"]) == ["1", "2", "4"], "powers of two that every problem has samples for"
    for k, estimate in fields["pass"].items():
        assert estimate["value"] == pytest.approx(counted(int(k)))
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert fields["avg"]["value"] == pytest.approx(counted(1)) == pytest.approx((1 / 4 + 3 / 4 + 0 + 1 + 3 / 5) / 5)
    assert fields["accuracy"] == pytest.approx(11 / 21), "over samples"


def test_rows_of_problems_are_kept(tmp_path: Path) -> None:
    made = trajectories()
    write_rows(tmp_path, 7, made[:3])
    write_rows(tmp_path, 7, made)
    [path] = (tmp_path / "evals").iterdir()
    assert path.name == "00000007.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == problem_rows(made)
    assert [row["prompt_id"] for row in rows] == list(RIGHT)
    assert [row["correct"] for row in rows] == [sum(rewards) for rewards in RIGHT.values()]
    assert rows[1]["verdicts"] == {"correct": 3, "wrong": 1}
    by_rollout = {t.rollout: t.num_response_tokens for t in made}
    assert rows[0]["lengths"] == [by_rollout[n] for n in range(4)]


def test_a_summary_has_what_the_event_says_and_reads_older_logs() -> None:
    fields = evaluation_fields(7, trajectories())
    told = evaluation(fields | {"wall_s": 1.0})
    assert (told.samples, list(told.passes)) == (4, ["1", "2", "4"])
    assert told.passes["4"] == fields["pass"]["4"]["value"]
    assert (told.accuracy_low, told.accuracy_high) == (fields["avg"]["low"], fields["avg"]["high"])
    older = {name: value for name, value in fields.items() if name not in ("avg", "pass", "samples", "problems")}
    told = evaluation(older | {"wall_s": 1.0})
    assert (told.samples, told.passes) == (1, {})
    assert told.accuracy_low < 11 / 21 < told.accuracy_high
