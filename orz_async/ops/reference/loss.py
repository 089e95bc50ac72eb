"""The clipped policy loss, the clipped value loss and their statistics in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) is half a thousand million: no token may count for more, and exp never overflows float32.
LOG_RATIO_LIMIT = 20.0
# Below this, expm1(d) - d cancels to noise and its series does not.
KL3_SERIES = 0.1


class Policy(NamedTuple):
    """What the clipped objective makes of M tokens. `low`, `high` and `dual` say which bound removed a gradient."""

    loss_M: Tensor
    slope_M: Tensor
    ratio_M: Tensor
    weight_M: Tensor
    capped_M: Tensor
    low_M: Tensor
    high_M: Tensor
    dual_M: Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32; float64 stays, so that the same code is its own oracle."""
    return x if x.dtype == torch.float64 else x.float()


def kept(x: Tensor | None, mask_N: Tensor | None) -> Tensor | None:
    """Masked rows are dropped, not multiplied by 0: whatever they hold, NaN included, cannot reach a sum."""
    return x if x is None or mask_N is None or not x.dim() else x[mask_N]


def restored(kept_M: Tensor, mask_N: Tensor | None) -> Tensor:
    """Inverse of `kept`, with 0 where masked out."""
    if mask_N is None:
        return kept_M
    return torch.zeros(mask_N.shape, dtype=kept_M.dtype, device=kept_M.device).masked_scatter(mask_N, kept_M)


def ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_policy(
    logprobs_M: Tensor,
    sampled_M: Tensor,
    advantages_M: Tensor,
    proximal_M: Tensor | None,
    denominator: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    behaviour_cap: float | None,
) -> Policy:
    """PPO (arXiv:1707.06347 eq. 7), dual clip (arXiv:1912.09729) and decoupled form (arXiv:2110.00641, AReaL)::

        ratio = current / proximal          weight = min(proximal / sampled, behaviour_cap)
        loss  = -weight * A * clip(ratio)   slope  = -weight * A * ratio where not clipped, else 0

    Written by cases, -min(ratio A, clip(ratio) A) takes ratio up to 1 + clip_high if A > 0, and if A < 0 from
    1 - clip_low up to dual_clip. Without a proximal policy the sampling one stands in, and weight is 1.
    """
    log_ratio_M = logprobs_M - (sampled_M if proximal_M is None else proximal_M)
    ratio_M = ratio(log_ratio_M)
    raw_M = torch.ones_like(ratio_M) if proximal_M is None else ratio(proximal_M - sampled_M)
    weight_M = raw_M if behaviour_cap is None else raw_M.clamp(max=behaviour_cap)
    up_M, down_M = advantages_M > 0, advantages_M < 0
    high_M, low_M = up_M & (ratio_M > 1 + clip_high), down_M & (ratio_M < 1 - clip_low)
    bounded_M = ratio_M.masked_fill(high_M, 1 + clip_high).masked_fill(low_M, 1 - clip_low)
    dual_M = torch.zeros_like(low_M)
    if dual_clip is not None:
        dual_M = down_M & (ratio_M > dual_clip)
        bounded_M = bounded_M.masked_fill(dual_M, dual_clip)
    gain_M = -weight_M * advantages_M / denominator.to(ratio_M.dtype)
    flat_M = high_M | low_M | dual_M | (log_ratio_M.abs() > LOG_RATIO_LIMIT)
    slope_M = (gain_M * ratio_M).masked_fill(flat_M, 0.0)
    return Policy(gain_M * bounded_M, slope_M, ratio_M, weight_M, raw_M > weight_M, low_M, high_M, dual_M)


def kl3(d: Tensor) -> Tensor:
    """exp(d) - 1 - d, never negative: an estimate of KL from samples of the other policy."""
    series = d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6))))
    return torch.where(d.abs() < KL3_SERIES, series, torch.expm1(d) - d)


def policy_stats(policy: Policy, drift_M: Tensor, entropy_M: Tensor | None) -> Tensor:
    """In the order of stats.PPO_FIELDS. `drift` is current - sampled log-prob."""
    rho_M = ratio(drift_M)
    total = [
        x.sum(dtype=torch.float64)
        for x in (policy.loss_M, policy.low_M, policy.high_M, policy.dual_M, policy.ratio_M)
        + (-drift_M, kl3(drift_M.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)), policy.weight_M, policy.capped_M)
        + (rho_M, rho_M.double().square())
    ]
    nothing = total[0].new_zeros(())
    extremes = [nothing - torch.inf, nothing + torch.inf]
    if len(drift_M):
        extremes = [policy.ratio_M.max().double(), policy.ratio_M.min().double()]
    entropy = nothing if entropy_M is None else entropy_M.sum(dtype=torch.float64)
    return torch.stack([nothing + len(drift_M), *total[:5], *extremes, *total[5:], entropy])


def ppo_loss(
    logprobs_N: Tensor,
    sampled_logprobs_N: Tensor,
    advantages_N: Tensor,
    proximal_logprobs_N: Tensor | None,
    entropy_N: Tensor | None,
    mask_N: Tensor | None,
    denominator: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    behaviour_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its derivative with respect to each log-prob, the statistics."""
    logprobs_M, sampled_M, advantages_M = (
        wide(x if mask_N is None else x[mask_N]) for x in (logprobs_N, sampled_logprobs_N, advantages_N)
    )
    proximal_M = kept(proximal_logprobs_N, mask_N)
    policy = clipped_policy(
        logprobs_M,
        sampled_M,
        advantages_M,
        None if proximal_M is None else wide(proximal_M),
        denominator if mask_N is None or not denominator.dim() else denominator[mask_N],
        clip_low,
        clip_high,
        dual_clip,
        behaviour_cap,
    )
    stats = policy_stats(policy, logprobs_M - sampled_M, kept(entropy_N, mask_N))
    loss = policy.loss_M.sum(dtype=torch.float64).to(policy.loss_M.dtype)
    return loss, restored(policy.slope_M, mask_N), stats


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    mask_N: Tensor | None,
    denominator: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """0.5 * max((V - R)^2, (V_clipped - R)^2) with V_clipped = V_old + clamp(V - V_old, -clip, clip)."""
    values_M, old_M, returns_M = (wide(x if mask_N is None else x[mask_N]) for x in (values_N, old_values_N, returns_N))
    scale = 1 / (denominator if mask_N is None or not denominator.dim() else denominator[mask_N]).to(values_M.dtype)
    worst_M = error_M = returns_M - values_M
    flat_M = torch.zeros_like(error_M, dtype=torch.bool)
    if clip is not None:
        move_M = values_M - old_M
        clipped_error_M = returns_M - (old_M + move_M.clamp(-clip, clip))
        # Inside the clip range both errors are one value, up to rounding: only outside can the gradient vanish.
        flat_M = (move_M.abs() > clip) & (clipped_error_M.abs() > error_M.abs())
        worst_M = torch.where(flat_M, clipped_error_M, error_M)
    loss = (0.5 * worst_M.square() * scale).sum(dtype=torch.float64)
    sums = (flat_M, values_M, returns_M, returns_M.double().square(), error_M, error_M.double().square())
    stats = torch.stack([loss.new_zeros(()) + len(error_M), loss, *(x.sum(dtype=torch.float64) for x in sums)])
    slope_M = (-error_M * scale).masked_fill(flat_M, 0.0)
    return loss.to(error_M.dtype), restored(slope_M, mask_N), stats
