# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the LM-head ops do row by row, around the tiles and the matrix products.

`target2`, `reference` and `top` are in base 2; log-probs, entropy and logsumexp in nats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orz_kernels.head_tiles import EXP, GRAD, PARTIALS, SUM
from orz_kernels.launching import LN2, LOG2E, TL_DTYPES, cdiv, launch, optional, pick, rounded

COMBINE_ROWS = pick(32, 256)
COMBINE_TILES = 16
# One row a program on the GPU: rows are long, and there are thousands.
ROWS = pick(1, 256)
WIDTH = pick(1024, 64)
RESCALE_BLOCK = pick(1024, 4096)

_GRAD = tl.constexpr(GRAD)
_EXP = tl.constexpr(EXP)
_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
# A sampled log-prob lower than this is not a reference: the row's sum, at least exp of it, must stay a normal number.
LOWEST_REFERENCE = tl.constexpr(-40.0)


@triton.jit(do_not_specialize=["num_rows"])
def _target_kernel(
    hidden, weight, targets, sampled, target2, reference, num_rows, width, scale2,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HAS_PRIOR: tl.constexpr,
):  # fmt: skip
    """The target's own logit, a dot product: with the sampled log-prob it foretells the row's logsumexp."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    y = tl.load(targets + row, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, width, WIDTH):
        i = start + tl.arange(0, WIDTH)[None, :]
        within = inside[:, None] & (i < width)
        x = tl.load(hidden + row.to(tl.int64)[:, None] * width + i, mask=within, other=0.0).to(tl.float32)
        total += x * tl.load(weight + y[:, None] * width + i, mask=within, other=0.0).to(tl.float32)
    z = tl.sum(total, 1) * scale2
    tl.store(target2 + row, z, mask=inside)
    if HAS_PRIOR:
        prior = tl.load(sampled + row, mask=inside, other=0.0).to(tl.float32)
        z -= tl.minimum(tl.maximum(prior, LOWEST_REFERENCE), 0.0) * _LOG2E
        tl.store(reference + row, z, mask=inside)
    else:
        tl.store(reference + row, tl.zeros_like(z), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    partials, target2, reference, logprobs, entropy, logsumexp, top, mass, others, num_rows, num_tiles, stride,
    ROWS: tl.constexpr, TILES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Add up a row's tiles in their order, at the row's highest power of two."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    lane = tl.arange(0, TILES)[:, None]
    partials += row[None, :]
    o = tl.zeros((ROWS,), tl.float32)
    if MODE == _GRAD:
        for start in range(0, num_tiles, TILES):
            at = partials + (start + lane).to(tl.int64) * 4 * stride
            o += tl.sum(tl.load(at + 3 * stride, mask=(start + lane < num_tiles) & inside[None, :], other=0.0), 0)
    else:
        t = tl.load(target2 + row, mask=inside, other=0.0) - tl.load(reference + row, mask=inside, other=0.0)
        highest = tl.ceil(t)
        for start in range(0, num_tiles, TILES):
            at = partials + (start + lane).to(tl.int64) * 4 * stride
            k = tl.load(at, mask=(start + lane < num_tiles) & inside[None, :], other=-1.0e30)
            highest = tl.maximum(highest, tl.max(k, 0))
        s = tl.exp2(t - highest)
        u = s * (t - highest)
        for start in range(0, num_tiles, TILES):
            at = partials + (start + lane).to(tl.int64) * 4 * stride
            within = (start + lane < num_tiles) & inside[None, :]
            shift = tl.load(at, mask=within, other=-1.0e30) - highest[None, :]
            scale = tl.exp2(shift)
            s_i = tl.load(at + stride, mask=within, other=0.0)
            s += tl.sum(scale * s_i, 0)
            u += tl.sum(scale * (tl.load(at + 2 * stride, mask=within, other=0.0) + shift * s_i), 0)
            if MODE == _EXP:
                o += tl.sum(scale * tl.load(at + 3 * stride, mask=within, other=0.0), 0)
        tl.store(logprobs + row, (t - highest - tl.log2(s)) * _LN2, mask=inside)
        tl.store(entropy + row, (tl.log2(s) - u / s) * _LN2, mask=inside)
        r = tl.load(reference + row, mask=inside, other=0.0)
        tl.store(logsumexp + row, (r + highest + tl.log2(s)) * _LN2, mask=inside)
        if MODE == _EXP:
            tl.store(top + row, highest, mask=inside)
            tl.store(mass + row, s, mask=inside)
    tl.store(others + row, o, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _rescale_kernel(
    partials, top, out, num_rows, vocab, tile_columns, partials_stride, out_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Bring the tiles of a row to the row's power of two: exact, and only where a logit overflowed its reference."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    highest = tl.load(top + row, mask=row < num_rows, other=0.0)
    if tl.max(highest, 0) > 0:
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            within = (highest > 0)[:, None] & (column < vocab)[None, :]
            tile = (column // tile_columns).to(tl.int64)[None, :]
            k = tl.load(partials + tile * 4 * partials_stride + row[:, None], mask=within, other=0.0)
            at = out + row[:, None] * out_stride + column[None, :]
            e = tl.load(at, mask=within, other=0.0).to(tl.float32) * tl.exp2(k - highest[:, None])
            tl.store(at, rounded(e, DTYPE), mask=within)


@triton.jit(do_not_specialize=["num_rows"])
def _scale_kernel(
    hidden, slopes, mass, factors, out, num_rows, width, inverse_tau,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """factor = d loss / d z-row over the row's sum; factor * hidden is what meets E in the product for the weight."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    slope = tl.load(slopes + row, mask=inside, other=0.0)
    factor = slope * inverse_tau / tl.load(mass + row, mask=inside, other=1.0)
    tl.store(factors + row, factor, mask=inside)
    for start in range(0, width, WIDTH):
        i = start + tl.arange(0, WIDTH)[None, :]
        within = inside[:, None] & (i < width)
        x = tl.load(hidden + row[:, None] * width + i, mask=within, other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * width + i, rounded(x * factor[:, None], DTYPE), mask=within)


@triton.jit(do_not_specialize=["num_rows"])
def _finish_kernel(
    product, weight, targets, factors, others, index, grad_hidden, num_rows, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HAS_INDEX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dX = factor * (o * W[y] - E @ W), into the row it belongs to."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    y = tl.load(targets + row, mask=inside, other=0).to(tl.int64)
    factor = tl.load(factors + row, mask=inside, other=0.0)[:, None]
    o = tl.load(others + row, mask=inside, other=0.0)[:, None]
    to = tl.load(index + row, mask=inside, other=0).to(tl.int64) if HAS_INDEX else row
    for start in range(0, width, WIDTH):
        i = start + tl.arange(0, WIDTH)[None, :]
        within = inside[:, None] & (i < width)
        w = tl.load(weight + y[:, None] * width + i, mask=within, other=0.0).to(tl.float32)
        p = tl.load(product + row[:, None] * width + i, mask=within, other=0.0)
        tl.store(grad_hidden + to[:, None] * width + i, rounded(factor * (o * w - p), DTYPE), mask=within)


@triton.jit
def _target_weight_kernel(
    hidden, order, sorted_targets, ends, factors, others, grad_weight, width, WIDTH: tl.constexpr, DTYPE: tl.constexpr
):
    """dW[y] += o * rounded(factor * x) over the rows whose target is y, in their order: no atomics."""
    place = tl.program_id(0)
    y = tl.load(sorted_targets + place).to(tl.int64)
    before = tl.load(sorted_targets + tl.maximum(place - 1, 0)).to(tl.int64)
    if (place == 0) | (before != y):
        i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = tl.load(grad_weight + y * width + i, mask=i < width, other=0.0)
        for at in range(place, tl.load(ends + place).to(tl.int32)):
            row = tl.load(order + at).to(tl.int64)
            x = tl.load(hidden + row * width + i, mask=i < width, other=0.0).to(tl.float32)
            total += tl.load(others + row) * rounded(x * tl.load(factors + row), DTYPE).to(tl.float32)
        tl.store(grad_weight + y * width + i, total, mask=i < width)


def foretell(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, sampled_C: Tensor | None, scale2: float
) -> tuple[Tensor, Tensor]:
    """The target's scaled logit, and the reference: near the logsumexp given the sampled log-prob, else 0."""
    target2_C, reference_C = (torch.empty(len(hidden_CD), device=hidden_CD.device) for _ in range(2))
    launch(
        _target_kernel, (cdiv(len(hidden_CD), ROWS),), hidden_CD, weight_VD, targets_C,
        optional(sampled_C, target2_C), target2_C, reference_C, *hidden_CD.shape, scale2,
        ROWS=ROWS, WIDTH=WIDTH, HAS_PRIOR=sampled_C is not None, num_warps=4,
    )  # fmt: skip
    return target2_C, reference_C


def combine(partials_TPC: Tensor, mode: int, target2_C: Tensor, reference_C: Tensor, out: tuple[Tensor, ...]) -> None:
    """Fill `out`: log-probs, entropy, logsumexp, top, mass, others. GRAD fills the last alone, SUM the first three."""
    num_rows, stride = len(target2_C), partials_TPC.shape[2]
    launch(
        _combine_kernel, (cdiv(num_rows, COMBINE_ROWS),), partials_TPC, target2_C, reference_C, *out, num_rows,
        len(partials_TPC), stride, ROWS=COMBINE_ROWS, TILES=COMBINE_TILES, MODE=mode, num_warps=4,
    )  # fmt: skip


def rescale(partials_TPC: Tensor, top_C: Tensor, out_CV: Tensor, vocab: int, tile_columns: int) -> None:
    launch(
        _rescale_kernel, (cdiv(len(top_C), ROWS),), partials_TPC, top_C, out_CV, len(top_C), vocab, tile_columns,
        partials_TPC.shape[2], out_CV.stride(0),
        ROWS=ROWS, BLOCK=RESCALE_BLOCK, DTYPE=TL_DTYPES[out_CV.dtype], num_warps=4,
    )  # fmt: skip


def scale_rows(
    hidden_CD: Tensor, slopes_C: Tensor, mass_C: Tensor, factors_C: Tensor, out_CD: Tensor, inverse_tau: float
) -> None:
    launch(
        _scale_kernel, (cdiv(len(hidden_CD), ROWS),), hidden_CD, slopes_C, mass_C, factors_C, out_CD,
        *hidden_CD.shape, inverse_tau, ROWS=ROWS, WIDTH=WIDTH, DTYPE=TL_DTYPES[out_CD.dtype], num_warps=4,
    )  # fmt: skip


def finish_hidden(
    product_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, factors_C: Tensor, others_C: Tensor,
    index_C: Tensor | None, grad_hidden_ND: Tensor,
) -> None:  # fmt: skip
    launch(
        _finish_kernel, (cdiv(len(product_CD), ROWS),), product_CD, weight_VD, targets_C, factors_C, others_C,
        optional(index_C, targets_C), grad_hidden_ND, *product_CD.shape, ROWS=ROWS, WIDTH=WIDTH,
        HAS_INDEX=index_C is not None, DTYPE=TL_DTYPES[grad_hidden_ND.dtype], num_warps=4,
    )  # fmt: skip


def add_targets(
    grad_weight_VD: Tensor, hidden_ND: Tensor, targets_N: Tensor, factors_N: Tensor, others_N: Tensor
) -> None:
    """The targets' share of the weight gradient, row by row of the vocabulary."""
    sorted_N, order_N = torch.sort(targets_N, stable=True)
    ends_N = torch.searchsorted(sorted_N, sorted_N, right=True)
    width = hidden_ND.shape[1]
    launch(
        _target_weight_kernel, (len(targets_N), cdiv(width, WIDTH)), hidden_ND, order_N, sorted_N, ends_N, factors_N,
        others_N, grad_weight_VD, width, WIDTH=WIDTH, DTYPE=TL_DTYPES[hidden_ND.dtype], num_warps=4,
    )  # fmt: skip


__all__ = [
    "EXP",
    "GRAD",
    "PARTIALS",
    "SUM",
    "add_targets",
    "combine",
    "finish_hidden",
    "foretell",
    "rescale",
    "scale_rows",
]
