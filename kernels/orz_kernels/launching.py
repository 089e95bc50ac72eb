# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The one place that starts a Triton kernel; `compile_check` listens here, so it compiles exactly what is launched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read once, as Triton itself does when it decorates a kernel: kernels then run on CPU tensors, in numpy.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter truncates float32 to bfloat16 and multiplies bfloat16 matrices wrongly; where this is set kernels
# do both by hand.
INTERPRET = tl.constexpr(INTERPRETED)

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start `kernel` on the device of its first tensor; `meta` holds constexprs, num_warps and num_stages."""
    # Multiply-add is fused whatever a Triton version's default is: error bounds and bitwise repeats rest on it.
    meta.setdefault("enable_fp_fusion", True)
    if _recorder is not None:
        _recorder(kernel, args, meta)
        return
    if 0 in grid:
        return
    first = next(x for x in args if isinstance(x, Tensor))
    if not first.is_cuda and not INTERPRETED:
        raise ValueError(
            f"Triton kernel {kernel.__name__}: expected tensors on a CUDA device, found {first.device}; "
            "set TRITON_INTERPRET=1 before Python starts to run kernels on CPU tensors, or ORZ_BACKEND=reference"
        )
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*args, **meta)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Hand every launch to `recorder` instead of the device."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def num_processors(x: Tensor) -> int:
    """Multiprocessors of the device of `x`; of a full Hopper chip when there is none."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pick(on_gpu: int, interpreted: int) -> int:
    """A block size. The interpreter takes about 10 ms a step whatever the size, so there blocks are few and big."""
    return interpreted if INTERPRETED else on_gpu


def optional(x: Tensor | None, standin: Tensor) -> Tensor:
    """A pointer the kernel never reads, where its constexpr says that the argument is absent."""
    return standin if x is None else x


def as_bytes(mask_N: Tensor | None, standin: Tensor) -> Tensor:
    """Triton has no pointer to bool."""
    return standin if mask_N is None else mask_N.view(torch.uint8)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 to DTYPE to nearest even, on the GPU and in the interpreter alike."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
