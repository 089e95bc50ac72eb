"""What came of a held-out evaluation during the run: the "eval" event, and RUN/evals with a row for each problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from orz_async.learner.durable import replace_file
from orz_async.learner.report import rollout_fields
from orz_async.observe.estimates import interval, pass_at_k
from orz_async.records import Trajectory

KS = (1, 2, 4, 8, 16, 32, 64, 128)


def problem_rows(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """One row a problem, in the order in which they were asked: samples, how many were right, verdicts, lengths."""
    by_problem: dict[str, list[Trajectory]] = {}
    for one in sorted(trajectories, key=lambda t: t.rollout):
        by_problem.setdefault(one.prompt_id, []).append(one)
    return [
        {
            "prompt_id": prompt_id,
            "samples": len(made),
            "correct": sum(t.reward == 1.0 for t in made),
            "verdicts": dict(sorted(Counter(t.verdict for t in made).items())),
            "lengths": [t.num_response_tokens for t in made],
        }
        for prompt_id, made in by_problem.items()
    ]


def evaluation_fields(version: int, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """The event: accuracy, avg@k over problems and pass@k for the powers of two up to k, each with a 95 % interval.

    k is the number of samples that every problem has at least; problems lose some when rollouts are given up.
    """
    rows = problem_rows(trajectories)
    samples = min(row["samples"] for row in rows)
    passes = {
        str(k): interval([pass_at_k(row["samples"], row["correct"], k) for row in rows])._asdict()
        for k in KS
        if k <= samples
    }
    return {
        "version": version,
        "accuracy": float(np.mean([t.reward for t in trajectories])),
        "problems": len(rows),
        "samples": samples,
        "avg": interval([row["correct"] / row["samples"] for row in rows])._asdict(),
        "pass": passes,
    } | rollout_fields(trajectories)


def write_rows(run_dir: Path, version: int, trajectories: Sequence[Trajectory]) -> None:
    """RUN/evals/VERSION.jsonl, whole or absent; an evaluation that a resumed run repeats takes its place."""
    lines = [msgspec.json.encode(row) + b"\n" for row in problem_rows(trajectories)]
    folder = run_dir / "evals"
    folder.mkdir(exist_ok=True)
    replace_file(folder / f"{version:08d}.jsonl", b"".join(lines))
