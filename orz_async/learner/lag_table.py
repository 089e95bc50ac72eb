"""Sums over response tokens by lag: how far the policy has moved since a token was sampled, and what PPO made of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orz_async.learner.batch import Microbatch
from orz_async.learner.model import PolicyTerms
from orz_async.learner.parallel import World

_SUMS = ("tokens", "ratio", "abs_delta", "outside_clip", "advantage", "value")
_MAX_LOG_RATIO = 20.0  # as in the loss: beyond it a ratio says "far", not how far


class Mismatch(NamedTuple):
    """Learner against engine: log-probs of the same tokens under the same weights, in nats."""

    max: float
    mean: float
    """Of |learner - engine|; `max` is the largest."""
    k3: float
    """Estimate of KL(engine || learner) a token."""
    tokens: int

    @classmethod
    def of(cls, worst: float, tokens: float, distance: float, k3: float) -> Mismatch:
        return cls(worst, distance / tokens, k3 / tokens, int(tokens)) if tokens else cls(0.0, 0.0, 0.0, 0)


class LagTable:
    """One row per lag from 0 to max_lag; and the mismatch between learner and engine where their weights are equal.

    `log_ratios_R` (current minus sampled log-prob) and `gaps_R` (the same at equal weights) hold what this rank
    computed of each token, and not-a-number elsewhere; of the rows that were shared, what any rank computed.
    """

    def __init__(self, max_lag: int, num_tokens: int = 0) -> None:
        self._sums = torch.zeros(max_lag + 1, len(_SUMS), dtype=torch.float64)
        self._mismatch = torch.zeros(max_lag + 1, 3, dtype=torch.float64)  # tokens, sum of |difference|, sum of k3
        self._mismatch_max = torch.zeros(max_lag + 1, dtype=torch.float64)
        self.log_ratios_R = torch.full((num_tokens,), float("nan"))
        self.gaps_R = torch.full((num_tokens,), float("nan"))

    def add(
        self,
        lag_R: NDArray[np.int32],
        values_R: Tensor,
        micro: Microbatch,
        logprobs_M: Tensor,
        terms: PolicyTerms,
        *,
        at_version: bool,
    ) -> None:
        """`at_version`: the log-probs are those of the version lag is counted from, so lag 0 means equal weights."""
        rows_M = micro.step_rows_M.cpu()
        lag_M = torch.from_numpy(lag_R)[rows_M].long()
        delta_M = (logprobs_M - micro.sampled_logprobs_M).cpu()
        ratio_M = delta_M.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        outside_M = (ratio_M < 1 - terms.clip_low) | (ratio_M > 1 + terms.clip_high)
        columns = (
            torch.ones_like(delta_M),
            ratio_M,
            delta_M.abs(),
            outside_M,
            terms.advantages_M.cpu(),
            values_R[micro.step_rows_M].cpu(),
        )
        self._sums.index_add_(0, lag_M, torch.stack([c.double() for c in columns], 1))
        self.log_ratios_R[rows_M] = delta_M.float()
        if at_version:
            self.add_mismatch(0, delta_M[lag_M == 0], rows_M[lag_M == 0])

    def add_mismatch(self, lag: int, delta_M: Tensor, rows_M: Tensor | None = None) -> None:
        """Log-prob of the learner minus that of the engine, for tokens of one lag scored under the weights they had.

        k3 = exp(d) - 1 - d of d = delta, never negative, is the low-variance estimator of KL(engine || learner) from
        the engine's own samples (Schulman 2020, http://joschu.net/blog/kl-approx.html).
        """
        if len(delta_M):
            if rows_M is not None:
                self.gaps_R[rows_M] = delta_M.float()
            delta_M = delta_M.double()
            k3_M = delta_M.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
            k3_M = k3_M.expm1() - k3_M
            tokens = torch.tensor(float(len(delta_M)), dtype=torch.float64)
            self._mismatch[lag] += torch.stack([tokens, delta_M.abs().sum(), k3_M.sum()])
            self._mismatch_max[lag] = torch.maximum(self._mismatch_max[lag], delta_M.abs().max())

    def sum_over(self, world: World) -> None:
        """All ranks: afterwards every rank holds the table of all of them."""
        parts = (self._sums, self._mismatch, self._mismatch_max)
        rows = torch.stack(world.gather(torch.cat([part.flatten() for part in parts])))
        total, end = rows.sum(0), self._sums.numel()
        self._sums = total[:end].view_as(self._sums)
        self._mismatch = total[end : end + self._mismatch.numel()].view_as(self._mismatch)
        self._mismatch_max = rows[:, -len(self._mismatch_max) :].amax(0)

    def share(self, world: World, rows: NDArray[np.int64]) -> None:
        """All ranks: `log_ratios_R` and `gaps_R` of these rows, whichever rank computed them, on every rank."""
        if world.size > 1:
            mine = torch.stack([self.log_ratios_R[rows], self.gaps_R[rows]])
            known = ~mine.isnan()
            values, counts = world.sum(torch.stack([torch.where(known, mine, 0.0), known.float()]))
            self.log_ratios_R[rows], self.gaps_R[rows] = torch.where(counts > 0, values, torch.nan)

    @property
    def histogram(self) -> dict[str, int]:
        """Trained tokens by lag, lags without tokens left out."""
        return {str(lag): int(row[0]) for lag, row in enumerate(self._sums.tolist()) if row[0]}

    def mismatch(self) -> Mismatch:
        """Over all lags; zeros without tokens that could be compared."""
        return Mismatch.of(float(self._mismatch_max.amax()), *self._mismatch.sum(0).tolist())

    def mismatch_by_lag(self) -> dict[str, dict[str, float]]:
        """The same for each lag that has tokens."""
        rows = zip(self._mismatch_max.tolist(), self._mismatch.tolist(), strict=True)
        return {str(lag): Mismatch.of(worst, *row)._asdict() for lag, (worst, row) in enumerate(rows) if row[0]}

    def means(self) -> dict[str, dict[str, Any]]:
        """By lag: means over its tokens of ratio current / sampled, |log ratio|, fraction outside the clip, ..."""
        return {
            str(lag): {"tokens": int(row[0])} | {name: x / row[0] for name, x in zip(_SUMS[1:], row[1:], strict=True)}
            for lag, row in enumerate(self._sums.tolist())
            if row[0]
        }
