"""What a loss says about itself: sums, so that microbatches and ranks can be added up before anything is divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

MAXIMA = ("ratio_max",)
MINIMA = ("ratio_min",)


@dataclass(frozen=True, slots=True)
class _Sums:
    """0-dimensional tensors that merge by +, or by max and min where the name says so."""

    @classmethod
    def from_vector(cls, vector: Tensor) -> Self:
        """Inverse of `vector`: what a kernel returns, or what another rank sent."""
        return cls(*vector.detach().unbind())

    def vector(self) -> Tensor:
        """float64, one element a field, in the order of the fields."""
        return torch.stack([getattr(self, f.name).detach().double() for f in fields(self)])

    def merge(self, other: Self) -> Self:
        """The statistics of both sets of tokens together."""
        return type(self)(*(_merge(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    @classmethod
    def _totals(cls, stats: Sequence[Self]) -> dict[str, float]:
        """Merge in the order given, on the host, in one copy from the device."""
        names = [f.name for f in fields(cls)]
        if not stats:
            return dict.fromkeys(names, 0.0)
        rows = torch.stack([s.vector() for s in stats]).cpu().tolist()
        totals: dict[str, float] = {}
        for name, *column in zip(names, *rows, strict=True):
            totals[name] = max(column) if name in MAXIMA else min(column) if name in MINIMA else math.fsum(column)
        return totals


def _merge(name: str, left: Tensor, right: Tensor) -> Tensor:
    if name in MAXIMA:
        return torch.maximum(left, right)
    return torch.minimum(left, right) if name in MINIMA else left + right


@dataclass(frozen=True, slots=True)
class PpoStats(_Sums):
    """Of the policy loss, over the tokens that count. d = current - sampled log-prob.

    ratio = current / proximal (the sampling policy, unless a proximal one was given); weight = proximal / sampled,
    truncated at the cap; rho = current / sampled. Log-ratios are limited to +-20 before exp.
    """

    tokens: Tensor
    loss: Tensor
    """Already divided by the denominator."""
    clip_low: Tensor
    """Tokens whose gradient the lower bound removed (negative advantage, ratio < 1 - clip_low)."""
    clip_high: Tensor
    """Tokens whose gradient the upper bound removed (positive advantage, ratio > 1 + clip_high)."""
    clip_dual: Tensor
    """Tokens whose gradient the dual clip removed (negative advantage, ratio > dual_clip)."""
    ratio_sum: Tensor
    ratio_max: Tensor
    """-inf without tokens."""
    ratio_min: Tensor
    """+inf without tokens."""
    k1_sum: Tensor
    """-d: KL(sampled || current), unbiased, may be negative."""
    k3_sum: Tensor
    """exp(d) - 1 - d: the same KL, never negative."""
    weight_sum: Tensor
    weight_capped: Tensor
    """Tokens whose weight the cap reduced."""
    rho_sum: Tensor
    rho_sq_sum: Tensor
    entropy_sum: Tensor
    """0 where the loss was not told the entropy."""

    @classmethod
    def finalise(cls, stats: Sequence[PpoStats]) -> dict[str, float]:
        """Means and fractions over the tokens of all of `stats`; all 0 if there are none."""
        total = cls._totals(stats)
        count = total["tokens"]
        if not count:
            return dict.fromkeys(_PPO_RESULTS, 0.0)
        square = total["rho_sq_sum"]
        return {
            "tokens": count,
            "loss": total["loss"],
            "clip_low": total["clip_low"] / count,
            "clip_high": total["clip_high"] / count,
            "clip_dual": total["clip_dual"] / count,
            "ratio_mean": total["ratio_sum"] / count,
            "ratio_max": total["ratio_max"],
            "ratio_min": total["ratio_min"],
            "kl_k1": total["k1_sum"] / count,
            "kl_k3": total["k3_sum"] / count,
            "weight_mean": total["weight_sum"] / count,
            "weight_capped": total["weight_capped"] / count,
            "entropy": total["entropy_sum"] / count,
            "ess": total["rho_sum"] ** 2 / (count * square) if square else 0.0,
        }


_PPO_RESULTS = (
    *("tokens", "loss", "clip_low", "clip_high", "clip_dual", "ratio_mean", "ratio_max", "ratio_min"),
    *("kl_k1", "kl_k3", "weight_mean", "weight_capped", "entropy", "ess"),
)


@dataclass(frozen=True, slots=True)
class ValueStats(_Sums):
    """Of the value loss, over the tokens that count. error = return - value."""

    tokens: Tensor
    loss: Tensor
    """Already divided by the denominator."""
    clipped: Tensor
    """Tokens whose gradient the clip removed."""
    value_sum: Tensor
    return_sum: Tensor
    return_sq_sum: Tensor
    error_sum: Tensor
    error_sq_sum: Tensor

    @classmethod
    def finalise(cls, stats: Sequence[ValueStats]) -> dict[str, float]:
        """Means over the tokens of all of `stats`; all 0 if there are none.

        explained_variance = 1 - Var(error) / Var(return), and 0 where the returns do not vary.
        """
        total = cls._totals(stats)
        count = total["tokens"]
        if not count:
            return dict.fromkeys(_VALUE_RESULTS, 0.0)
        return_mean, return_square = total["return_sum"] / count, total["return_sq_sum"] / count
        return_variance = return_square - return_mean**2
        error_square = total["error_sq_sum"] / count
        error_variance = error_square - (total["error_sum"] / count) ** 2
        # Float32 partial sums carry about seven digits: less spread than that is none.
        varies = return_variance > 1e-6 * return_square
        return {
            "tokens": count,
            "loss": total["loss"],
            "clipped": total["clipped"] / count,
            "value_mean": total["value_sum"] / count,
            "return_mean": return_mean,
            "error_rms": math.sqrt(max(error_square, 0.0)),
            "explained_variance": 1 - error_variance / return_variance if varies else 0.0,
        }


_VALUE_RESULTS = ("tokens", "loss", "clipped", "value_mean", "return_mean", "error_rms", "explained_variance")


class PpoHeadOutput(NamedTuple):
    """What `ppo_head` gives back; only `loss` carries gradients."""

    loss: Tensor
    logprobs_N: Tensor
    """float32, 0 where masked out."""
    entropy_N: Tensor
    """float32, 0 where masked out."""
    stats: PpoStats


PPO_FIELDS = tuple(f.name for f in fields(PpoStats))
VALUE_FIELDS = tuple(f.name for f in fields(ValueStats))
