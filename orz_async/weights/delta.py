"""One segment of a tensor against the same segment of another version, in whichever form is smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from orz_async.weights.wire import Block

if TYPE_CHECKING:
    import torch

CODED_DTYPES = ("float32", "bfloat16", "float16")
"""What `ops.delta_encode` takes; other dtypes are sent whole if they changed."""


def encode_block(new: memoryview, old: memoryview, dtype: str) -> tuple[Block, memoryview]:
    """How `new` reaches a holder of `old`, and the bytes it takes. A "full" piece is `new` itself, not a copy."""
    from orz_async import ops

    if np.array_equal(_comparable(new), _comparable(old)):
        return Block("same", 0), memoryview(b"")
    if dtype in CODED_DTYPES:
        coded = ops.delta_encode(_words(new, dtype), _words(old, dtype), threads=1)  # training goes on beside it
        if len(coded) < len(new):
            return Block("delta", len(coded)), memoryview(coded)
    return Block("full", len(new)), new


def apply_block(segment: memoryview, dtype: str, block: Block, piece: memoryview | bytes | bytearray) -> None:
    """Turn the old segment into the new one, in place. Raises ValueError, segment untouched, if they do not fit."""
    from orz_async import ops

    if block.form == "full":
        segment[:] = memoryview(piece)
    elif block.form == "delta":
        if dtype not in CODED_DTYPES:
            raise ValueError(f"expected a delta of {', '.join(CODED_DTYPES)}, got one of {dtype}")
        ops.delta_apply(_words(segment, dtype), bytes(piece), threads=1)  # generation goes on beside it


def _comparable(data: memoryview) -> np.ndarray[tuple[int], np.dtype[np.uint64 | np.uint8]]:
    return np.frombuffer(data, np.uint64 if len(data) % 8 == 0 else np.uint8)


def _words(data: memoryview, dtype: str) -> torch.Tensor:
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    return torch.frombuffer(data, dtype=kind)
