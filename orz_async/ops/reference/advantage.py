"""Advantages and their whitening in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from orz_async.ops.reference.loss import wide


def gae(
    rewards_N: Tensor,
    values_N: Tensor,
    cu_seqlens_B1: Tensor,
    gamma: float,
    lam: float,
    mask_N: Tensor | None,
    bootstrap_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Schulman et al. 2015 (arXiv:1506.02438) eq. 16, written for the return G = A + V instead of A::

        G_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * G_{t+1}),   V = G = bootstrap after the last token
        A_t = G_t - V_t

    The usual form adds up delta_t = r_t + gamma * V_{t+1} - V_t, whose values cancel only after each has been rounded:
    over a long sequence at gamma = lam = 1 the error grows with the length. Here no value enters a sum that others
    cancel, and (1, 1) gives exactly "rewards to come, minus value". Tokens that are masked out do not exist: the
    sequence closes over them, their rewards and values are not read, and both results are 0 there.
    """
    rewards_N, values_N, ends_B1 = wide(rewards_N), wide(values_N), cu_seqlens_B1.long()
    if mask_N is not None:
        kept = mask_N.nonzero().squeeze(1)
        counts_N1 = torch.nn.functional.pad(mask_N.long().cumsum(0), (1, 0))
        dense = gae(rewards_N[kept], values_N[kept], counts_N1[ends_B1], gamma, lam, None, bootstrap_B)
        zeros = torch.zeros_like(rewards_N)
        return zeros.index_copy(0, kept, dense[0]), zeros.index_copy(0, kept, dense[1])

    filled = ends_B1[1:] > ends_B1[:-1]
    last = ends_B1[1:][filled] - 1
    bootstrap = torch.zeros_like(last, dtype=values_N.dtype) if bootstrap_B is None else wide(bootstrap_B)[filled]
    next_values_N = torch.nn.functional.pad(values_N[1:], (0, 1)) if len(values_N) else values_N
    returns_N = rewards_N + (gamma * (1 - lam)) * next_values_N.index_copy(0, last, bootstrap)
    returns_N.index_add_(0, last, (gamma * lam) * bootstrap)
    # G_t = b_t + a_t * G_{t+1} is an affine map of G_{t+1}; composing maps over spans of 1, 2, 4, ... tokens solves all
    # sequences at once, and a = 0 at each last token keeps them apart.
    slopes_N = torch.full_like(returns_N, gamma * lam).index_fill(0, last, 0.0)
    longest = int((ends_B1[1:] - ends_B1[:-1]).max()) if len(filled) else 0
    span = 1
    while span < longest:
        returns_N[:-span] += slopes_N[:-span] * returns_N[span:].clone()
        slopes_N = torch.cat([slopes_N[:-span] * slopes_N[span:], torch.zeros_like(slopes_N[-span:])])
        span *= 2
    return returns_N - values_N, returns_N


def moments(x_N: Tensor, mask_N: Tensor | None) -> Tensor:
    """Count, mean and sum of squared deviations, in two passes: not E[x^2] - mean^2, which cancels."""
    x_N = (x_N if mask_N is None else x_N[mask_N]).double()
    mean = x_N.sum() / max(len(x_N), 1)
    return torch.stack([mean.new_tensor(float(len(x_N))), mean, (x_N - mean).square().sum()])


def whiten(x_N: Tensor, mask_N: Tensor | None, moments_3: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) with the population variance; 0 where masked out."""
    count, mean, m2 = moments_3.double().unbind()
    scale = torch.rsqrt(m2 / count.clamp(min=1.0) + eps)
    white_N = (((x_N.double()) - mean) * scale).to(wide(x_N).dtype)
    return white_N if mask_N is None else torch.where(mask_N, white_N, 0.0)
