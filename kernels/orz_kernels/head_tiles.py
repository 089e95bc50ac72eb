# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Tiles of logits become what is needed of them, in registers: row sums, exponentials, or gradients.

A tile is [rows, columns] of z = hidden @ weight.T in float32. In base 2, with scale2 = log2(e) / tau,

    d = z * scale2 - reference          e = 2^(d - k)          k an integer for each (row, tile)

Three modes share one epilogue and one layout of partial results [tile, (k, s, u, o), row]; sums leave the target out:

    SUM   s = sum e, u = sum e * (d - k), k = ceil(max d); nothing is stored
    EXP   the same, and E = rounded(e) is stored and o = sum E. k is 0 unless d exceeds LIMIT: PPO's sampled log-prob
          gives a reference near the logsumexp before any logit is known, so there is no running maximum, no second pass
    GRAD  stores E = rounded(e * (slope + spread * (log p + entropy))), the reference being the logsumexp; o = sum E

The target's column is stored as 0. What it weighs is o, exact in float32: a row of d loss / d logits then sums to 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orz_kernels.launching import INTERPRET, LN2, rounded

SUM = 0
EXP = 1
GRAD = 2
PARTIALS = 4  # k, s, u, o

_EXP = tl.constexpr(EXP)
_GRAD = tl.constexpr(GRAD)
_LN2 = tl.constexpr(LN2)
# Finite, so that 2^LOWEST * LOWEST is 0.
LOWEST = tl.constexpr(-1.0e30)
# 2^32 leaves 2^95 for the sum and for the products with it.
LIMIT = tl.constexpr(32.0)


@triton.jit
def _stored(e, DTYPE: tl.constexpr):
    """The tile as it is stored, and the same values as float32."""
    if tl.bfloat16 == DTYPE and not INTERPRET:
        # Pairs: one conversion for two elements. Alone, each would queue for the units that make the exponentials.
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=r,=f,=f,f,f",
            [e],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    low = rounded(e, DTYPE)
    return low, low.to(tl.float32)


@triton.jit
def tile_epilogue(
    z, column, y, left, reference, slope, spread, entropy, scale2,
    MODE: tl.constexpr, SPREAD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The stored tile, and k, s, u, o by row. Columns and y count from the tile's first; `left` columns exist."""
    apart = (column[None, :] == y[:, None]) | (column[None, :] >= left)
    z = tl.where(apart, LOWEST, z)
    if MODE == _GRAD:
        k = tl.zeros_like(reference)
        d = z * scale2 - reference[:, None]
        e = tl.exp2(d)
        s, u = k, k
        e *= slope[:, None] + spread[:, None] * (d * _LN2 + entropy[:, None]) if SPREAD else slope[:, None]
    else:
        top = tl.max(z, 1) * scale2 - reference
        k = tl.where(top > LIMIT, tl.ceil(top), 0.0) if MODE == _EXP else tl.ceil(top)
        d = z * scale2 - (reference + k)[:, None]
        e = tl.exp2(d)
        s = tl.sum(e, 1)
        u = tl.sum(e * d, 1)
    stored, wide = _stored(e, DTYPE)
    return stored, k, s, u, tl.sum(wide, 1)


@triton.jit
def put_partials(partials, tile, row, inside, stride, k, s, u, o, MODE: tl.constexpr):
    partials += tile.to(tl.int64) * 4 * stride + row
    if MODE != _GRAD:
        tl.store(partials, k, mask=inside)
        tl.store(partials + stride, s, mask=inside)
        tl.store(partials + 2 * stride, u, mask=inside)
    tl.store(partials + 3 * stride, o, mask=inside)


@triton.jit
def row_arguments(targets, reference, slope, spread, entropy, row, inside, MODE: tl.constexpr, SPREAD: tl.constexpr):
    y = tl.load(targets + row, mask=inside, other=-1).to(tl.int32)
    r = tl.load(reference + row, mask=inside, other=0.0)
    g, h, m = r, r, r
    if MODE == _GRAD:
        g = tl.load(slope + row, mask=inside, other=0.0)
        if SPREAD:
            h = tl.load(spread + row, mask=inside, other=0.0)
            m = tl.load(entropy + row, mask=inside, other=0.0)
    return y, r, g, h, m


@triton.jit(do_not_specialize=["num_rows"])
def logits_tiles_kernel(
    logits, targets, reference, slope, spread, entropy, partials, out,
    num_rows, first_column, num_columns, first_tile, logits_stride, out_stride, partials_stride, scale2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr, SPREAD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The epilogue over float32 logits [num_rows, num_columns] that a library's matrix product left in memory."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    inside = row < num_rows
    column = tl.arange(0, COLUMNS)
    left = num_columns - tile * COLUMNS
    within = inside[:, None] & (column[None, :] < left)
    y, r, g, h, m = row_arguments(targets, reference, slope, spread, entropy, row, inside, MODE, SPREAD)
    at = row.to(tl.int64)[:, None] * logits_stride + tile * COLUMNS + column[None, :]
    z = tl.load(logits + at, mask=within, other=0.0)
    y -= first_column + tile * COLUMNS
    e, k, s, u, o = tile_epilogue(z, column, y, left, r, g, h, m, scale2, MODE, SPREAD, DTYPE)
    if MODE != 0:
        at = row.to(tl.int64)[:, None] * out_stride + first_column + tile * COLUMNS + column[None, :]
        tl.store(out + at, e, mask=within)
    put_partials(partials, first_tile + tile, row, inside, partials_stride, k, s, u, o, MODE)


@triton.jit
def head_tiles_kernel(
    hidden, weight, out, targets, reference, slope, spread, entropy, partials,
    num_rows, vocab, width, partials_stride, scale2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    MODE: tl.constexpr, SPREAD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Matrix product and epilogue in one: logits stay in registers. Persistent; loads by the tensor copy engine.

    The loop is flat over (tile, step), so that the copies for the next tile are under way during an epilogue.
    """
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(vocab, COLUMNS)
    steps = tl.cdiv(width, DEPTH)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        # GROUP tiles of rows walk along the vocabulary together: the rows stay in L2, the weight is read once a group.
        band = tile // (GROUP * column_tiles)
        size = min(row_tiles - band * GROUP, GROUP)
        row_tile = band * GROUP + (tile % (GROUP * column_tiles)) % size
        column_tile = (tile % (GROUP * column_tiles)) // size
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(steps):
            x = hidden.load([row_tile * ROWS, step * DEPTH])
            w = weight.load([column_tile * COLUMNS, step * DEPTH])
            if INTERPRET:
                x, w = x.to(tl.float32), w.to(tl.float32)
            z = tl.dot(x, w.T, z, input_precision="ieee")
        row = row_tile * ROWS + tl.arange(0, ROWS)
        inside = row < num_rows
        first = column_tile * COLUMNS
        y, r, g, h, m = row_arguments(targets, reference, slope, spread, entropy, row, inside, MODE, SPREAD)
        e, k, s, u, o = tile_epilogue(
            z, tl.arange(0, COLUMNS), y - first, vocab - first, r, g, h, m, scale2, MODE, SPREAD, DTYPE
        )
        if MODE != 0:
            out.store([row_tile * ROWS, first], e)
        put_partials(partials, column_tile, row, inside, partials_stride, k, s, u, o, MODE)
