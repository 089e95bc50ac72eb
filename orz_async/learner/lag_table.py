"""Sums over response tokens by lag: how far the policy has moved since a token was sampled, and what PPO made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orz_async.learner.batch import Microbatch
from orz_async.learner.model import PolicyTerms
from orz_async.learner.parallel import World

_SUMS = ("tokens", "ratio", "abs_delta", "outside_clip", "advantage", "value")
_MAX_LOG_RATIO = 20.0  # as in the loss: beyond it a ratio says "far", not how far


class LagTable:
    """One row per lag from 0 to max_lag; and the mismatch between learner and engine where their weights are equal."""

    def __init__(self, max_lag: int) -> None:
        self._sums = torch.zeros(max_lag + 1, len(_SUMS), dtype=torch.float64)
        self._mismatch = torch.zeros(2, dtype=torch.float64)  # sum, tokens
        self._mismatch_max = torch.zeros(1, dtype=torch.float64)

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
        lag_M = torch.from_numpy(lag_R)[micro.step_rows_M.cpu()].long()
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
        if at_version:
            self.add_mismatch(delta_M[lag_M == 0])

    def add_mismatch(self, delta_M: Tensor) -> None:
        """Differences between the log-probs of learner and engine for tokens whose weights were equal."""
        if len(delta_M):
            distance_M = delta_M.double().abs()
            self._mismatch += torch.stack([distance_M.sum(), torch.tensor(float(len(delta_M)), dtype=torch.float64)])
            self._mismatch_max = torch.maximum(self._mismatch_max, distance_M.max())

    def sum_over(self, world: World) -> None:
        """All ranks: afterwards every rank holds the table of all of them."""
        rows = world.gather(torch.cat([self._sums.flatten(), self._mismatch, self._mismatch_max]))
        total = torch.stack(rows).sum(0)
        self._sums = total[:-3].view_as(self._sums)
        self._mismatch = total[-3:-1]
        self._mismatch_max = torch.stack(rows)[:, -1:].amax(0)

    @property
    def histogram(self) -> dict[str, int]:
        """Trained tokens by lag, lags without tokens left out."""
        return {str(lag): int(row[0]) for lag, row in enumerate(self._sums.tolist()) if row[0]}

    def mismatch(self) -> tuple[float, float, int]:
        """(largest, mean, tokens) of |learner - engine| log-prob at equal weights; zeros without such tokens."""
        total, tokens = self._mismatch.tolist()
        return float(self._mismatch_max), total / tokens if tokens else 0.0, int(tokens)

    def means(self) -> dict[str, dict[str, Any]]:
        """By lag: means over its tokens of ratio current / sampled, |log ratio|, fraction outside the clip, ..."""
        return {
            str(lag): {"tokens": int(row[0])} | {name: x / row[0] for name, x in zip(_SUMS[1:], row[1:], strict=True)}
            for lag, row in enumerate(self._sums.tolist())
            if row[0]
        }
