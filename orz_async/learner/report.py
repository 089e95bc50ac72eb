"""The "step" and "eval" events: what a learner step and an evaluation say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from orz_async.learner.advantage import explained_variance
from orz_async.learner.lag_table import LagTable
from orz_async.learner.step import Step, UpdateReport
from orz_async.records import Trajectory

CALIBRATION_EDGES = tuple(n / 10 for n in range(11))
"""Of the bins of predicted values; one more bin below and above them."""


def rollout_fields(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    lengths = [t.num_response_tokens for t in trajectories]
    return {
        "rollouts": len(trajectories),
        "length_mean": float(np.mean(lengths)),
        "length_max": max(lengths),
        "truncated_fraction": sum(t.finish == "length" for t in trajectories) / len(trajectories),
        "verdicts": dict(sorted(Counter(t.verdict for t in trajectories).items())),
    }


def step_fields(step: Step, policy: UpdateReport, table: LagTable, critic: UpdateReport) -> dict[str, Any]:
    batch = step.batch
    mismatch = table.mismatch()
    # Both stats add up the losses of all optimizer steps; what is reported is their mean.
    return rollout_fields(batch.trajectories) | {
        "step": batch.version,
        "version": batch.version + 1,
        "reward_mean": float(batch.rewards_B.double().mean()),
        "tokens_trained": batch.num_response_tokens,
        "lag_max": int(batch.lag_R.max()),
        "lag_mean": float(batch.lag_R.mean()),
        "lag_histogram": table.histogram,
        "by_lag": table.means(),
        "policy": policy.stats | {"loss": _mean(policy.losses)},
        "value": critic.stats | {"loss": _mean(critic.losses)},
        "grad_norm": _mean(policy.grad_norms),
        "critic_grad_norm": _mean(critic.grad_norms),
        "lr": policy.lr,
        "critic_lr": critic.lr,
        **{f"mismatch_{name}": value for name, value in mismatch._asdict().items()},
        "mismatch_by_lag": table.mismatch_by_lag(),
        "explained_variance": explained_variance(step.values_R, step.returns_R),
        "calibration": calibration(step),
        "losses": {"policy": policy.losses, "value": critic.losses},
        "skipped": [*policy.skipped, *critic.skipped],
    }


def _mean(values: Sequence[float]) -> float:
    """0 where no optimizer step was taken: no critic, a frozen policy, a step left out."""
    return float(np.mean(values)) if values else 0.0


def calibration(step: Step) -> dict[str, list[float]]:
    """Response tokens in bins of the value the critic predicted: how many, sum of the values, sum of the returns."""
    values_R, returns_R = (x.detach().double().cpu().numpy() for x in (step.values_R, step.returns_R))
    bins_R = np.digitize(values_R, CALIBRATION_EDGES)
    count = len(CALIBRATION_EDGES) + 1
    return {
        "tokens": np.bincount(bins_R, minlength=count).tolist(),
        "values": np.bincount(bins_R, values_R, count).tolist(),
        "returns": np.bincount(bins_R, returns_R, count).tolist(),
    }
