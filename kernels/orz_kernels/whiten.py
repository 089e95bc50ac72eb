# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Moments by blocks, merged in a fixed order (Chan, Golub and LeVeque 1979), and whitening with them.

Never E[x^2] - mean^2: it cancels. A block gives (n, mean, M2 = sum of (x - mean)^2); blocks merge exactly:

    mean = sum n_i mean_i / n        M2 = sum M2_i + n_i (mean_i - mean)^2
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orz_kernels.launching import as_bytes, cdiv, launch, pick
from orz_kernels.registry import register

BLOCK = pick(4096, 16384)
MERGE = 1024


@triton.jit
def block_moments(moments, x, kept, block, num_blocks):
    """Store count, mean and M2 of the kept elements of one block into row-major float64 [3, num_blocks].

    Far from 0 the first mean is rounded by more than the spread may bear; what the deviations from it add up to says
    by how much.
    """
    count = tl.sum(kept.to(tl.float32), 0)
    least = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(kept, x, 0.0), 0) / least
    deviation = tl.where(kept, x - mean, 0.0)
    rest = tl.sum(deviation, 0)
    tl.store(moments + block, count.to(tl.float64))
    tl.store(moments + num_blocks + block, mean.to(tl.float64) + (rest / least).to(tl.float64))
    tl.store(moments + 2 * num_blocks + block, (tl.sum(deviation * deviation, 0) - rest * rest / least).to(tl.float64))


@triton.jit(do_not_specialize=["num_elements", "num_blocks"])
def _moments_kernel(x, mask, moments, num_elements, num_blocks, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    kept = i < num_elements
    if HAS_MASK:
        kept = kept & (tl.load(mask + i, mask=kept, other=0) != 0)
    block_moments(moments, tl.load(x + i, mask=kept, other=0.0).to(tl.float32), kept, block, num_blocks)


@triton.jit(do_not_specialize=["num_blocks"])
def _merge_kernel(moments, out, num_blocks, MERGE: tl.constexpr):
    """One program, so that the order of the additions is fixed."""
    lane = tl.arange(0, MERGE)
    count = tl.zeros((MERGE,), tl.float64)
    total = tl.zeros((MERGE,), tl.float64)
    for start in range(0, num_blocks, MERGE):
        inside = start + lane < num_blocks
        n = tl.load(moments + start + lane, mask=inside, other=0.0)
        count += n
        total += n * tl.load(moments + num_blocks + start + lane, mask=inside, other=0.0)
    n_all = tl.sum(count, 0)
    mean_all = tl.sum(total, 0) / tl.maximum(n_all, 1.0)
    m2 = tl.zeros((MERGE,), tl.float64)
    for start in range(0, num_blocks, MERGE):
        inside = start + lane < num_blocks
        n = tl.load(moments + start + lane, mask=inside, other=0.0)
        apart = tl.load(moments + num_blocks + start + lane, mask=inside, other=0.0) - mean_all
        m2 += tl.load(moments + 2 * num_blocks + start + lane, mask=inside, other=0.0)
        m2 += n * apart * apart
    tl.store(out, n_all)
    tl.store(out + 1, mean_all)
    tl.store(out + 2, tl.sum(m2, 0))


@triton.jit(do_not_specialize=["num_elements"])
def _whiten_kernel(x, mask, moments, out, num_elements, eps, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_elements
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
    mean = tl.load(moments + 1)
    scale = 1.0 / tl.sqrt(tl.load(moments + 2) / tl.maximum(tl.load(moments), 1.0) + eps)
    # The difference in float64: a mean far from 0 would cost the digits that matter.
    apart = (tl.load(x + i, mask=kept, other=0.0).to(tl.float64) - mean).to(tl.float32)
    tl.store(out + i, tl.where(kept, apart * scale.to(tl.float32), 0.0), mask=inside)


def merge_moments(moments_3P: Tensor) -> Tensor:
    """[3] of [3, P], float64."""
    out_3 = torch.empty(3, dtype=torch.float64, device=moments_3P.device)
    launch(_merge_kernel, (1,), moments_3P, out_3, moments_3P.shape[1], MERGE=MERGE, num_warps=4)
    return out_3


@register
def moments(x_N: Tensor, mask_N: Tensor | None) -> Tensor:
    """float64 [3]: count, mean and sum of squared deviations of the elements that count."""
    num_blocks = cdiv(len(x_N), BLOCK)
    moments_3P = torch.empty((3, num_blocks), dtype=torch.float64, device=x_N.device)
    launch(
        _moments_kernel, (num_blocks,), x_N, as_bytes(mask_N, x_N), moments_3P, len(x_N), num_blocks,
        BLOCK=BLOCK, HAS_MASK=mask_N is not None, num_warps=8,
    )  # fmt: skip
    return merge_moments(moments_3P)


@moments.register_fake
def _(x_N, _mask_N):
    return x_N.new_empty(3, dtype=torch.float64)


@register
def whiten(x_N: Tensor, mask_N: Tensor | None, moments_3: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(M2 / count + eps) in float32, 0 where masked out."""
    out_N = torch.empty(x_N.shape, dtype=torch.float32, device=x_N.device)
    launch(
        _whiten_kernel, (cdiv(len(x_N), BLOCK),), x_N, as_bytes(mask_N, x_N), moments_3, out_N, len(x_N), eps,
        BLOCK=BLOCK, HAS_MASK=mask_N is not None, num_warps=8,
    )  # fmt: skip
    return out_N


@whiten.register_fake
def _(x_N, *_rest):
    return x_N.new_empty(x_N.shape, dtype=torch.float32)
