# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The LM head, shared by `ppo_head` and `head_logprob`: chunks of rows, tiles of logits, products for the gradients.

Two ways to make the tiles of a chunk. `fused`: one Triton kernel multiplies and keeps the logits in registers.
`library`: the library multiplies into float32, a block of the vocabulary at a time, and a second kernel reads it once.
The products for the gradients are the library's either way: they are plain, and nothing beats it at them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orz_kernels.head_tiles import GRAD, PARTIALS, SUM, head_tiles_kernel, logits_tiles_kernel
from orz_kernels.launching import LOG2E, TL_DTYPES, cdiv, launch, num_processors, optional, pick

Variant = Literal["fused", "library"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a tile of logits and how many hands work on it."""

    rows: int
    columns: int
    depth: int = 0
    warps: int = 8
    stages: int = 3
    group: int = 8


FUSED = Tiles(pick(128, 128), pick(256, 4096), pick(64, 256))
LIBRARY = Tiles(pick(4, 128), pick(2048, 8192))
# Shapes of the fused kernel that do not spill; a benchmark tries them in turn.
CANDIDATES = (Tiles(128, 256, 64), Tiles(128, 128, 64, warps=4), Tiles(128, 128, 64, stages=4), Tiles(256, 128, 64))
# Columns of float32 logits in memory at a time with `library`.
LOGITS_COLUMNS = 16384
# From this width on the product is so long that passing once more over the logits costs less than what the library's
# product gains on Triton's. A prediction (README.md), not a measurement.
LIBRARY_WIDTH = 2048
MOST_ROWS = 16384


@dataclass(frozen=True, slots=True)
class Head:
    """One call's plan and its scratch, reused by every chunk."""

    weight_VD: Tensor
    chunk: int
    variant: Variant
    tiles: Tiles
    scale2: float
    out_CV: Tensor  # E, with rows padded to 128 elements
    partials_TPC: Tensor
    logits_CV: Tensor
    product_CD: Tensor

    @property
    def vocab(self) -> int:
        return self.weight_VD.shape[0]


def usable(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """float16 has not the range of exponentials: it is computed, and its gradients are made, in float32."""
    if hidden_ND.dtype == torch.float16:
        return hidden_ND.float(), weight_VD.float()
    return hidden_ND, weight_VD


def choose_variant(hidden_ND: Tensor) -> Variant:
    """The tensor copy engine wants rows of a multiple of 16 bytes; float32 products are the library's on any width."""
    width = hidden_ND.shape[1]
    aligned = width * hidden_ND.element_size() % 16 == 0 and hidden_ND.data_ptr() % 16 == 0
    return "fused" if aligned and hidden_ND.dtype == torch.bfloat16 and width < LIBRARY_WIDTH else "library"


def choose_chunk(num_rows: int, weight_VD: Tensor, chunk: int | None) -> int:
    """Rows at a time: a power of two whose scratch takes at most a sixteenth of the device's memory.

    Of all its memory, not of what is free now: equal calls must add up in equal order.
    """
    if chunk is None:
        device = weight_VD.device
        memory = torch.cuda.get_device_properties(device).total_memory if weight_VD.is_cuda else 2**33
        rows = max(memory // 16 // (len(weight_VD) * weight_VD.element_size()), 128)
        chunk = min(2 ** (rows.bit_length() - 1), MOST_ROWS)
    return max(min(chunk, num_rows), 1)


def plan(
    hidden_ND: Tensor, weight_VD: Tensor, temperature: float, chunk: int | None, mode: int,
    variant: Variant | None = None, tiles: Tiles | None = None,
) -> Head:  # fmt: skip
    vocab, width = weight_VD.shape
    variant = variant or choose_variant(hidden_ND)
    tiles = tiles or (FUSED if variant == "fused" else LIBRARY)
    rows = choose_chunk(len(hidden_ND), weight_VD, chunk)
    kept = 0 if mode == SUM else rows
    blocks = min(cdiv(vocab, tiles.columns) * tiles.columns, LOGITS_COLUMNS) if variant == "library" else 0
    new = weight_VD.new_empty
    return Head(
        weight_VD=weight_VD,
        chunk=rows,
        variant=variant,
        tiles=tiles,
        scale2=LOG2E / temperature,
        out_CV=new((kept, cdiv(vocab, 128) * 128)),
        partials_TPC=new((cdiv(vocab, tiles.columns), PARTIALS, cdiv(rows, 4) * 4), dtype=torch.float32),
        logits_CV=new((rows if blocks else 0, blocks), dtype=torch.float32),
        product_CD=new((kept, width), dtype=torch.float32),
    )


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, added up and stored in float32 whatever the operands are."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def subtract_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out -= a @ b in float32; `first` takes out as 0 without reading it."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=-1, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=beta, alpha=-1, out=out)


def make_tiles(
    head: Head, mode: int, hidden_CD: Tensor, targets_C: Tensor, reference_C: Tensor,
    slope_C: Tensor | None = None, spread_C: Tensor | None = None, entropy_C: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill head.partials_TPC and, unless the mode is SUM, head.out_CV for one chunk of rows."""
    rows = (targets_C, reference_C, *(optional(x, reference_C) for x in (slope_C, spread_C, entropy_C)))
    make = _fused_tiles if head.variant == "fused" else _library_tiles
    make(head, mode, mode == GRAD and spread_C is not None, hidden_CD, rows)


def _fused_tiles(head: Head, mode: int, spread: bool, hidden_CD: Tensor, rows: tuple[Tensor, ...]) -> None:
    (num_rows, width), tiles = hidden_CD.shape, head.tiles
    # SUM stores nothing, but a descriptor must describe something.
    out_CV = head.weight_VD if mode == SUM else head.out_CV
    shape = list(head.weight_VD.shape) if mode == SUM else [num_rows, head.vocab]
    programs = min(cdiv(num_rows, tiles.rows) * cdiv(head.vocab, tiles.columns), num_processors(hidden_CD))
    launch(
        head_tiles_kernel, (programs,),
        TensorDescriptor(hidden_CD, [num_rows, width], [width, 1], [tiles.rows, tiles.depth]),
        TensorDescriptor(head.weight_VD, [head.vocab, width], [width, 1], [tiles.columns, tiles.depth]),
        TensorDescriptor(out_CV, shape, [out_CV.stride(0), 1], [tiles.rows, tiles.columns]),
        *rows, head.partials_TPC, num_rows, head.vocab, width, head.partials_TPC.shape[2], head.scale2,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, GROUP=tiles.group,
        PROGRAMS=num_processors(hidden_CD), MODE=mode, SPREAD=spread, DTYPE=TL_DTYPES[head.out_CV.dtype],
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _library_tiles(head: Head, mode: int, spread: bool, hidden_CD: Tensor, rows: tuple[Tensor, ...]) -> None:
    num_rows, tiles = len(hidden_CD), head.tiles
    for first in range(0, head.vocab, LOGITS_COLUMNS):
        weight_BD = head.weight_VD[first : first + LOGITS_COLUMNS]
        logits_CB = head.logits_CV[:num_rows, : len(weight_BD)]
        product(hidden_CD, weight_BD.t(), logits_CB)
        launch(
            logits_tiles_kernel, (cdiv(num_rows, tiles.rows), cdiv(len(weight_BD), tiles.columns)), logits_CB, *rows,
            head.partials_TPC, head.out_CV, num_rows, first, len(weight_BD), first // tiles.columns,
            logits_CB.stride(0), head.out_CV.stride(0), head.partials_TPC.shape[2], head.scale2,
            ROWS=tiles.rows, COLUMNS=tiles.columns, MODE=mode, SPREAD=spread, DTYPE=TL_DTYPES[head.out_CV.dtype],
            num_warps=tiles.warps,
        )  # fmt: skip
