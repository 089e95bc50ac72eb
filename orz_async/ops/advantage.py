"""Advantages: gae and whiten, alone and over ranks. Not differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orz_async.ops import backend, checks


def gae(
    rewards_N: Tensor,
    values_N: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    gamma: float,
    lam: float,
    mask_N: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over packed sequences: (advantages_N, returns_N), returns = advantages + values.

    delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1},   A = 0 and V = bootstrap_B (or 0)
    after the last token of a sequence. Tokens where `mask_N` is False (observations) are skipped as if they were not
    there, reward included; they get 0.
    """
    checks.tensor("values_N", values_N, [None])
    checks.tensor("rewards_N", rewards_N, [len(values_N)], like=values_N)
    if mask_N is not None:
        checks.tensor("mask_N", mask_N, [len(values_N)], [torch.bool], like=values_N)
    checks.cu_seqlens("cu_seqlens_B1", cu_seqlens_B1, values_N)
    checks.number("gamma", gamma, 0.0, 1.0)
    checks.number("lam", lam, 0.0, 1.0)
    if bootstrap_B is not None:
        checks.tensor("bootstrap_B", bootstrap_B, [len(cu_seqlens_B1) - 1], like=values_N)
        checks.finite("bootstrap_B", bootstrap_B)
    with torch.no_grad():
        advantages_N, returns_N = backend.for_tensor(values_N).gae(
            rewards_N, values_N, cu_seqlens_B1, float(gamma), float(lam), mask_N, bootstrap_B
        )
    if not checks.is_finite(advantages_N):
        # Each token's reward and value enter its advantage: one look at the result instead of two at what came in.
        checks.finite("rewards_N", rewards_N, mask_N)
        checks.finite("values_N", values_N, mask_N)
    return advantages_N, returns_N


def moments(x_N: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """float64 [3]: count, mean and sum of squared deviations. What ranks exchange to whiten over all of them."""
    checks.tensor("x_N", x_N, [None])
    checks.vectors(x_N, mask_N, x_N=x_N)
    with torch.no_grad():
        result: Tensor = backend.for_tensor(x_N).moments(x_N, mask_N)
    return result


def merge_moments(parts: Sequence[Tensor]) -> Tensor:
    """Chan et al. 1979, in the order given, so that every rank gets the same bits."""
    for i, part in enumerate(parts):
        checks.tensor(f"parts[{i}]", part, [3], [torch.float64], like=parts[0])
    total = torch.zeros(3, dtype=torch.float64) if not parts else parts[0]
    for part in parts[1:]:
        (n, mean, m2), (other_n, other_mean, other_m2) = total.unbind(), part.unbind()
        count = n + other_n
        share = other_n / count.clamp(min=1.0)
        shift = other_mean - mean
        total = torch.stack([count, mean + shift * share, m2 + other_m2 + shift.square() * n * share])
    return total


def whiten(
    x_N: Tensor,
    mask_N: Tensor | None = None,
    *,
    eps: float = 1e-8,
    over: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) with the population variance, over the tokens that count; 0 elsewhere.

    The mean and variance are those of `x_N`; or of `over`, the merged moments of all the pieces of which `x_N` is one;
    or, with `group`, of the tokens of all its ranks, merged in the order of the ranks.
    """
    checks.positive("eps", eps)
    checks.require(over is None or group is None, "over", "either `over` or `group`", "both")
    if over is None:
        over = moments(x_N, mask_N)
        if group is not None:
            parts = [torch.empty_like(over) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(parts, over, group=group)
            over = merge_moments(parts)
    else:
        checks.tensor("x_N", x_N, [None])
        checks.vectors(x_N, mask_N, x_N=x_N)
        checks.tensor("over", over, [3], [torch.float64], like=x_N)
    with torch.no_grad():
        result: Tensor = backend.for_tensor(x_N).whiten(x_N, mask_N, over, eps)
    return result
