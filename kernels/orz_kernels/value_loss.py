# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The clipped value loss, its derivative and its statistics: one pass over the tokens, one small merge.

error = R - V         clipped error = R - (V_old + clamp(V - V_old, -clip, clip))
loss  = sum 0.5 * max(error^2, clipped error^2) / denominator        slope = -error / denominator, 0 where clipped
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from orz_kernels.launching import as_bytes, cdiv, launch, pick
from orz_kernels.ppo_loss import merge_partials
from orz_kernels.registry import register

FIELDS = ("tokens", "loss", "clipped", "value_sum", "return_sum", "return_sq_sum", "error_sum", "error_sq_sum")
BLOCK = pick(1024, 16384)


@triton.jit
def _put(partials, x, field: tl.constexpr, block, num_blocks):
    tl.store(partials + field * num_blocks + block, tl.sum(x, 0))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _loss_kernel(
    values, old_values, returns, mask, denominator, slopes, partials, num_tokens, num_blocks, clip,
    BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
    value = tl.load(values + i, mask=kept, other=0.0).to(tl.float32)
    old = tl.load(old_values + i, mask=kept, other=0.0).to(tl.float32)
    total = tl.load(returns + i, mask=kept, other=0.0).to(tl.float32)
    error = total - value
    moved = value - old
    clipped_error = total - (old + tl.minimum(tl.maximum(moved, -clip), clip))
    # Inside the clip range both are the same value but for rounding; only outside can the gradient vanish.
    flat = (tl.abs(moved) > clip) & (tl.abs(clipped_error) > tl.abs(error))
    worst = tl.where(flat, clipped_error, error)
    scale = tl.load(denominator + i, mask=kept, other=1.0) if PER_TOKEN else tl.load(denominator)
    scale = 1.0 / scale.to(tl.float32)
    tl.store(slopes + i, tl.where(flat, 0.0, -error * scale), mask=inside)
    _put(partials, kept.to(tl.float32), 0, block, num_blocks)
    _put(partials, 0.5 * worst * worst * scale, 1, block, num_blocks)
    _put(partials, flat.to(tl.float32), 2, block, num_blocks)
    _put(partials, value, 3, block, num_blocks)
    _put(partials, total, 4, block, num_blocks)
    _put(partials, total * total, 5, block, num_blocks)
    _put(partials, error, 6, block, num_blocks)
    _put(partials, error * error, 7, block, num_blocks)


@register
def value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, mask_N: Tensor | None, denominator: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [], d loss / d values_N, and the statistics of FIELDS, float64."""
    num_tokens = len(values_N)
    num_blocks = cdiv(num_tokens, BLOCK)
    slopes_N = torch.empty(num_tokens, dtype=torch.float32, device=values_N.device)
    partials_FP = torch.empty((len(FIELDS), num_blocks), dtype=torch.float32, device=values_N.device)
    launch(
        _loss_kernel, (num_blocks,), values_N, old_values_N, returns_N, as_bytes(mask_N, values_N), denominator,
        slopes_N, partials_FP, num_tokens, num_blocks, math.inf if clip is None else clip,
        BLOCK=BLOCK, HAS_MASK=mask_N is not None, PER_TOKEN=denominator.dim() > 0, num_warps=4,
    )  # fmt: skip
    loss, stats_F = merge_partials(partials_FP, has_extremes=False)
    return loss, slopes_N, stats_F


@value_loss.register_fake
def _(values_N, *_rest):
    loss = values_N.new_empty((), dtype=torch.float32)
    slopes_N = values_N.new_empty(values_N.shape, dtype=torch.float32)
    return loss, slopes_N, values_N.new_empty(len(FIELDS), dtype=torch.float64)
