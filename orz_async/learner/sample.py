"""Which rollouts of a step are looked at token by token: by lot, and the same lot on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orz_async.config import Config
from orz_async.learner.batch import StepBatch
from orz_async.learner.lag_table import LagTable
from orz_async.learner.step import Step
from orz_async.observe.tokens import StepTokens
from orz_async.records import float32_bytes, int32_bytes

_AUDIT, _SAMPLE = 3, 4  # beside the permutations of policy and critic, which are drawn from the same seed and version


def audited_members(config: Config, batch: StepBatch) -> list[int]:
    """Positions in the batch of the rollouts whose log-probs are compared under the weights that sampled them."""
    rng = np.random.default_rng([config.seed, batch.version, _AUDIT])
    count = min(config.learner.audit_rollouts, batch.num_sequences)
    return sorted(rng.choice(batch.num_sequences, count, replace=False).tolist())


def sampled_members(config: Config, batch: StepBatch) -> list[int]:
    """Positions in the batch of up to `sample_rollouts` rollouts: first the audited ones, then others.

    At least one, and as many as fit into `sample_tokens` response tokens; none where `sample_rollouts` is 0.
    """
    order = np.random.default_rng([config.seed, batch.version, _SAMPLE]).permutation(batch.num_sequences)
    is_audited_B = np.isin(order, np.asarray(audited_members(config, batch), dtype=np.int64))
    tokens = config.observe.sample_tokens
    chosen: list[int] = []
    for b in [*order[is_audited_B].tolist(), *order[~is_audited_B].tolist()][: config.observe.sample_rollouts]:
        tokens -= int(batch.response_lengths_B[b])
        if tokens < 0 and chosen:
            break
        chosen.append(b)
    return sorted(chosen)


def response_rows(batch: StepBatch, members: Sequence[int]) -> NDArray[np.int64]:
    """Rows of the step's response tokens that belong to these rollouts, rollout by rollout."""
    edges = batch.cu_responses_B1
    return np.concatenate([np.arange(edges[b], edges[b + 1]) for b in members] or [np.zeros(0, np.int64)])


def token_sample(step: Step, table: LagTable, members: Sequence[int]) -> StepTokens | None:
    """These rollouts token by token, as the log of tokens keeps them; None where the policy was not looked at."""
    batch, rows = step.batch, response_rows(step.batch, members)
    if not len(rows) or bool(table.log_ratios_R.isnan()[rows].any()):
        return None

    def column(values_R: Any) -> bytes:
        return float32_bytes(values_R.detach().cpu().numpy()[rows])

    return StepTokens(
        step=batch.version,
        rollouts=int32_bytes([batch.trajectories[b].rollout for b in members]),
        lengths=int32_bytes(batch.response_lengths_B[list(members)]),
        values=column(step.values_R),
        advantages=column(step.advantages_R),
        log_ratios=column(table.log_ratios_R),
        gaps=column(table.gaps_R),
    )
