# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""LM head, log-prob, PPO loss, statistics and gradients in one pass: 6TVH operations, no logits kept or made twice.

A token's gradient with respect to its logits is slope / tau * (onehot - p), and slope depends on nothing but its own
log-prob, sampled log-prob and advantage. With E = exp(z - reference), S its sum and f = slope / (tau * S),

    dX = f * (o * W[y] - E @ W)            dW = onehot.T @ (o * f * X) - E.T @ (f * X)

where E[y] is left out and o is the sum of the *stored* others, so that rounding cannot push a row of dz off its zero
sum: what all rows of W have in common would leak into dX otherwise. No value is read back to the host, except the
number of rows that a mask keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orz_kernels.head import Head, Tiles, Variant, make_tiles, plan, product, subtract_product, usable
from orz_kernels.head_rows import add_targets, combine, finish_hidden, foretell, rescale, scale_rows
from orz_kernels.head_tiles import EXP
from orz_kernels.launching import cdiv
from orz_kernels.ppo_loss import FIELDS, merge_partials, policy_terms
from orz_kernels.registry import register


class _Rows:
    """What is known of each row that counts, filled chunk by chunk."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        # Padded, so that each begins at a multiple of 16 bytes and no kernel is compiled twice.
        new = torch.empty((7, cdiv(num_rows, 128) * 128), device=device)[:, :num_rows]
        self.logprobs, self.entropy, self.logsumexp, self.top, self.mass, self.others, self.factors = new


def _chunk(
    head: Head, at: slice, rows: _Rows, hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, index_C: Tensor | None,
    policy: tuple[Any, ...], clips: tuple[Any, ...], inverse_tau: float,
    grad_hidden_ND: Tensor | None, grad_weight_VD: Tensor | None,
) -> None:  # fmt: skip
    sampled_C = policy[0]
    target2_C, reference_C = foretell(hidden_CD, weight_VD, targets_C, sampled_C, head.scale2)
    make_tiles(head, EXP, hidden_CD, targets_C, reference_C)
    filled = tuple(x[at] for x in (rows.logprobs, rows.entropy, rows.logsumexp, rows.top, rows.mass, rows.others))
    combine(head.partials_TPC, EXP, target2_C, reference_C, filled)
    if grad_hidden_ND is None and grad_weight_VD is None:
        return
    rescale(head.partials_TPC, rows.top[at], head.out_CV, head.vocab, head.tiles.columns)
    slopes_C, _ = policy_terms(rows.logprobs[at], *policy, *clips)
    scaled_CD = torch.empty_like(hidden_CD)
    scale_rows(hidden_CD, slopes_C, rows.mass[at], rows.factors[at], scaled_CD, inverse_tau)
    out_CV = head.out_CV[: len(hidden_CD), : head.vocab]
    if grad_hidden_ND is not None:
        product_CD = head.product_CD[: len(hidden_CD)]
        product(out_CV, weight_VD, product_CD)
        to_ND = grad_hidden_ND if index_C is not None else grad_hidden_ND[at]
        finish_hidden(product_CD, weight_VD, targets_C, rows.factors[at], rows.others[at], index_C, to_ND)
    if grad_weight_VD is not None:
        subtract_product(grad_weight_VD, out_CV.t(), scaled_CD, first=at.start == 0)


def compute(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, sampled_logprobs_N: Tensor, advantages_N: Tensor,
    proximal_logprobs_N: Tensor | None, mask_N: Tensor | None, denominator: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, behaviour_cap: float | None, temperature: float, chunk: int | None,
    need_hidden: bool, need_weight: bool, variant: Variant | None = None, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`ppo_head` with the way to make the tiles as an argument, for benchmarks and tests."""
    num_rows, dtype, device = len(hidden_ND), hidden_ND.dtype, hidden_ND.device
    hidden_ND, weight_VD = usable(hidden_ND, weight_VD)
    index_M = None if mask_N is None else mask_N.nonzero().squeeze(1)

    def kept(x: Tensor | None) -> Tensor | None:
        return x if x is None or index_M is None or not x.dim() else x[index_M]

    if index_M is not None:
        hidden_ND, targets_N = hidden_ND[index_M], targets_N[index_M]
    policy_M: tuple[Any, ...] = tuple(kept(x) for x in (sampled_logprobs_N, advantages_N, proximal_logprobs_N))
    denominator = denominator if index_M is None or not denominator.dim() else denominator[index_M]
    clips: tuple[Any, ...] = (clip_low, clip_high, dual_clip, behaviour_cap)
    head = plan(hidden_ND, weight_VD, temperature, chunk, EXP, variant, tiles)
    rows = _Rows(len(hidden_ND), device)
    make = torch.empty if index_M is None else torch.zeros
    grad_hidden_ND = make((num_rows, hidden_ND.shape[1]), dtype=dtype, device=device) if need_hidden else None
    grad_weight_VD = torch.zeros(weight_VD.shape, device=device) if need_weight else None
    for start in range(0, len(hidden_ND), head.chunk):
        at = slice(start, start + head.chunk)
        policy_C = (*(None if x is None else x[at] for x in policy_M), None, None)
        scale = denominator[at] if denominator.dim() else denominator
        _chunk(
            head, at, rows, hidden_ND[at], weight_VD, targets_N[at], None if index_M is None else index_M[at],
            (*policy_C, scale), clips, 1 / temperature, grad_hidden_ND, grad_weight_VD,
        )  # fmt: skip
    if grad_weight_VD is not None:
        add_targets(grad_weight_VD, hidden_ND, targets_N, rows.factors, rows.others)
    everything: list[Any] = [rows.logprobs, *policy_M, rows.entropy, None, denominator, *clips]
    _, partials_FP = policy_terms(*everything)
    loss, stats_F = merge_partials(partials_FP, has_extremes=True)
    logprobs_N, entropy_N = rows.logprobs.clone(), rows.entropy.clone()
    if index_M is not None:
        zeros_N = torch.zeros(num_rows, device=device)
        logprobs_N, entropy_N = (zeros_N.index_copy(0, index_M, x) for x in (logprobs_N, entropy_N))
    # Two tensors, not one twice: the results of a registered op may not be each other.
    no_hidden, no_weight = torch.empty(0, dtype=dtype, device=device), torch.empty(0, device=device)
    return (
        loss,
        no_hidden if grad_hidden_ND is None else grad_hidden_ND,
        no_weight if grad_weight_VD is None else grad_weight_VD,
        logprobs_N,
        entropy_N,
        stats_F,
    )


@register
def ppo_head_grads(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, sampled_logprobs_N: Tensor, advantages_N: Tensor,
    proximal_logprobs_N: Tensor | None, mask_N: Tensor | None, denominator: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, behaviour_cap: float | None, temperature: float, chunk: int | None,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return compute(
        hidden_ND, weight_VD, targets_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N, mask_N, denominator,
        clip_low, clip_high, dual_clip, behaviour_cap, temperature, chunk, need_hidden, need_weight,
    )  # fmt: skip


@ppo_head_grads.register_fake
def _(hidden_ND, weight_VD, targets_N, *rest):
    need_hidden, need_weight = rest[-2:]
    new = hidden_ND.new_empty
    return (
        new((), dtype=torch.float32),
        new(hidden_ND.shape if need_hidden else 0),
        new(weight_VD.shape if need_weight else 0, dtype=torch.float32),
        new(targets_N.shape, dtype=torch.float32),
        new(targets_N.shape, dtype=torch.float32),
        new(len(FIELDS), dtype=torch.float64),
    )


def ppo_head(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, sampled_logprobs_N: Tensor, advantages_N: Tensor,
    proximal_logprobs_N: Tensor | None, mask_N: Tensor | None, denominator: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, behaviour_cap: float | None, temperature: float, chunk: int | None,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [], gradients of hidden (its dtype) and weight (float32), log-probs, entropy, statistics of FIELDS."""
    loss, grad_hidden_ND, grad_weight_VD, logprobs_N, entropy_N, stats_F = ppo_head_grads(
        hidden_ND, weight_VD, targets_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N, mask_N, denominator,
        clip_low, clip_high, dual_clip, behaviour_cap, temperature, chunk, need_hidden, need_weight,
    )  # fmt: skip
    return (
        loss,
        grad_hidden_ND if need_hidden else None,
        grad_weight_VD if need_weight else None,
        logprobs_N,
        entropy_N,
        stats_F,
    )
