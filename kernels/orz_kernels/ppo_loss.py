# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The clipped policy loss, its derivative and its statistics: one pass over the tokens, one small merge.

    ratio = current / proximal        weight = min(proximal / sampled, cap)        rho = current / sampled
    loss  = sum -weight * A * clip(ratio) / denominator
    slope = -weight * A * ratio / denominator where not clipped, else 0

The proximal policy is the sampling one where none is given, and the weight is then 1. Each block of tokens writes its
partial sums, and one program a statistic adds them in their order, in float64: results repeat bitwise.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from orz_kernels.launching import LOG2E, as_bytes, cdiv, launch, optional, pick
from orz_kernels.registry import register

FIELDS = (
    *("tokens", "loss", "clip_low", "clip_high", "clip_dual", "ratio_sum", "ratio_max", "ratio_min", "k1_sum"),
    *("k3_sum", "weight_sum", "weight_capped", "rho_sum", "rho_sq_sum", "entropy_sum"),
)
_MAX = FIELDS.index("ratio_max")
_MIN = FIELDS.index("ratio_min")

BLOCK = pick(1024, 16384)
MERGE = 1024
_LOG2E = tl.constexpr(LOG2E)
# exp(20) is half a thousand million: no token may count for more, and no square of it overflows float32.
LIMIT = tl.constexpr(20.0)


@triton.jit
def _limited_exp(x):
    return tl.exp2(tl.minimum(tl.maximum(x, -LIMIT), LIMIT) * _LOG2E)


@triton.jit
def _kl3(d, exp_d):
    """exp(d) - 1 - d. Below 0.5 by its series: there the difference cancels, to 0 for |d| under 3e-4."""
    tail = 1 + d * (1.0 / 6) * (1 + d * (1.0 / 7) * (1 + d * (1.0 / 8) * (1 + d * (1.0 / 9))))
    series = d * d * 0.5 * (1 + d * (1.0 / 3) * (1 + d * 0.25 * (1 + d * 0.2 * tail)))
    return tl.where(tl.abs(d) < 0.5, series, exp_d - 1 - d)


@triton.jit
def _put(partials, x, field: tl.constexpr, block, num_blocks):
    tl.store(partials + field * num_blocks + block, tl.sum(x, 0))


@triton.jit
def _put_extremes(partials, ratio, kept, block, num_blocks):
    tl.store(partials + 6 * num_blocks + block, tl.max(tl.where(kept, ratio, -float("inf")), 0))
    tl.store(partials + 7 * num_blocks + block, tl.min(tl.where(kept, ratio, float("inf")), 0))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _loss_kernel(
    current, sampled, advantages, proximal, entropy, mask, denominator, slopes, partials, num_tokens, num_blocks,
    lowest, highest, dual, cap,
    BLOCK: tl.constexpr, HAS_PROXIMAL: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_MASK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
    logprob = tl.load(current + i, mask=kept, other=0.0).to(tl.float32)
    behaviour = tl.load(sampled + i, mask=kept, other=0.0).to(tl.float32)
    advantage = tl.load(advantages + i, mask=kept, other=0.0).to(tl.float32)
    drift = logprob - behaviour
    log_ratio = drift
    raw = tl.where(kept, 1.0, 0.0)
    if HAS_PROXIMAL:
        near = tl.load(proximal + i, mask=kept, other=0.0).to(tl.float32)
        log_ratio = logprob - near
        raw = tl.where(kept, _limited_exp(near - behaviour), 0.0)
    weight = tl.minimum(raw, cap)
    ratio = _limited_exp(log_ratio)
    clip_high = (advantage > 0) & (ratio > highest)
    clip_low = (advantage < 0) & (ratio < lowest)
    clip_dual = (advantage < 0) & (ratio > dual)
    used = tl.where(clip_high, highest, tl.where(clip_low, lowest, tl.where(clip_dual, dual, ratio)))
    scale = tl.load(denominator + i, mask=kept, other=1.0) if PER_TOKEN else tl.load(denominator)
    gain = -weight * advantage / scale.to(tl.float32)
    flat = clip_high | clip_low | clip_dual | (tl.abs(log_ratio) > LIMIT)
    tl.store(slopes + i, tl.where(flat, 0.0, gain * ratio), mask=inside)
    rho = tl.where(kept, _limited_exp(drift), 0.0)
    _put(partials, kept.to(tl.float32), 0, block, num_blocks)
    _put(partials, gain * used, 1, block, num_blocks)
    _put(partials, clip_low.to(tl.float32), 2, block, num_blocks)
    _put(partials, clip_high.to(tl.float32), 3, block, num_blocks)
    _put(partials, clip_dual.to(tl.float32), 4, block, num_blocks)
    _put(partials, tl.where(kept, ratio, 0.0), 5, block, num_blocks)
    _put_extremes(partials, ratio, kept, block, num_blocks)
    _put(partials, -drift, 8, block, num_blocks)
    _put(partials, tl.where(kept, _kl3(tl.minimum(tl.maximum(drift, -LIMIT), LIMIT), rho), 0.0), 9, block, num_blocks)
    _put(partials, weight, 10, block, num_blocks)
    _put(partials, (raw > weight).to(tl.float32), 11, block, num_blocks)
    _put(partials, rho, 12, block, num_blocks)
    _put(partials, rho * rho, 13, block, num_blocks)
    spread = tl.zeros((BLOCK,), tl.float32)
    if HAS_ENTROPY:
        spread = tl.load(entropy + i, mask=kept, other=0.0).to(tl.float32)
    _put(partials, spread, 14, block, num_blocks)


@triton.jit(do_not_specialize=["num_blocks"])
def _merge_kernel(partials, stats, loss, num_blocks, MAX: tl.constexpr, MIN: tl.constexpr, MERGE: tl.constexpr):
    """One program a statistic; the order of the additions depends on the number of tokens alone."""
    field = tl.program_id(0)
    partials += field.to(tl.int64) * num_blocks
    lane = tl.arange(0, MERGE)
    total = tl.zeros((MERGE,), tl.float64)
    top = tl.full((MERGE,), -float("inf"), tl.float32)
    bottom = tl.full((MERGE,), float("inf"), tl.float32)
    for start in range(0, num_blocks, MERGE):
        inside = start + lane < num_blocks
        x = tl.load(partials + start + lane, mask=inside, other=0.0)
        total += x.to(tl.float64)
        top = tl.maximum(top, tl.where(inside, x, -float("inf")))
        bottom = tl.minimum(bottom, tl.where(inside, x, float("inf")))
    result = tl.sum(total, 0)
    if field == MAX:
        result = tl.max(top, 0).to(tl.float64)
    if field == MIN:
        result = tl.min(bottom, 0).to(tl.float64)
    tl.store(stats + field, result)
    if field == 1:
        tl.store(loss, result.to(tl.float32))


def merge_partials(partials_FP: Tensor, *, has_extremes: bool) -> tuple[Tensor, Tensor]:
    """float32 loss [] and float64 statistics [F] from the blocks' partial sums; the loss is field 1."""
    num_fields, num_blocks = partials_FP.shape
    loss = torch.empty((), dtype=torch.float32, device=partials_FP.device)
    stats_F = torch.empty(num_fields, dtype=torch.float64, device=partials_FP.device)
    launch(
        _merge_kernel, (num_fields,), partials_FP, stats_F, loss, num_blocks,
        MAX=_MAX if has_extremes else -1, MIN=_MIN if has_extremes else -1, MERGE=MERGE, num_warps=4,
    )  # fmt: skip
    return loss, stats_F


def policy_terms(
    logprobs_N: Tensor, sampled_logprobs_N: Tensor, advantages_N: Tensor, proximal_logprobs_N: Tensor | None,
    entropy_N: Tensor | None, mask_N: Tensor | None, denominator: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, behaviour_cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d loss / d logprobs_N, and the partial sums [fields, blocks] of everything else."""
    num_tokens, any_N = len(logprobs_N), logprobs_N
    num_blocks = cdiv(num_tokens, BLOCK)
    slopes_N = torch.empty(num_tokens, dtype=torch.float32, device=any_N.device)
    partials_FP = torch.empty((len(FIELDS), num_blocks), dtype=torch.float32, device=any_N.device)
    launch(
        _loss_kernel, (num_blocks,), logprobs_N, sampled_logprobs_N, advantages_N,
        optional(proximal_logprobs_N, any_N), optional(entropy_N, any_N), as_bytes(mask_N, any_N), denominator,
        slopes_N, partials_FP, num_tokens, num_blocks, 1 - clip_low, 1 + clip_high,
        math.inf if dual_clip is None else dual_clip, math.inf if behaviour_cap is None else behaviour_cap,
        BLOCK=BLOCK, HAS_PROXIMAL=proximal_logprobs_N is not None, HAS_ENTROPY=entropy_N is not None,
        HAS_MASK=mask_N is not None, PER_TOKEN=denominator.dim() > 0, num_warps=4,
    )  # fmt: skip
    return slopes_N, partials_FP


@register
def ppo_loss(
    logprobs_N: Tensor, sampled_logprobs_N: Tensor, advantages_N: Tensor, proximal_logprobs_N: Tensor | None,
    entropy_N: Tensor | None, mask_N: Tensor | None, denominator: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, behaviour_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [], d loss / d logprobs_N, and the statistics of FIELDS, float64."""
    slopes_N, partials_FP = policy_terms(
        logprobs_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N, entropy_N, mask_N, denominator,
        clip_low, clip_high, dual_clip, behaviour_cap,
    )  # fmt: skip
    loss, stats_F = merge_partials(partials_FP, has_extremes=True)
    return loss, slopes_N, stats_F


@ppo_loss.register_fake
def _(logprobs_N, *_rest):
    loss = logprobs_N.new_empty((), dtype=torch.float32)
    slopes_N = logprobs_N.new_empty(logprobs_N.shape, dtype=torch.float32)
    return loss, slopes_N, logprobs_N.new_empty(len(FIELDS), dtype=torch.float64)
