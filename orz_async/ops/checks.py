"""Checks of arguments: each raises ValueError with the argument's name, what was expected and what was found.

Values are read on the host only. On a GPU that would wait for the device, and a learner's loss is checked there anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def require(condition: bool, argument: str, expected: object, found: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, found {found}")


def tensor(
    argument: str,
    x: Any,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = FLOATS,
    *,
    like: Tensor | None = None,
) -> None:
    """`shape` holds None for an axis of any length; `like` is a tensor whose device must be shared."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{argument}: expected a torch.Tensor, found {type(x).__name__}")
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    require(x.dtype in dtypes, argument, names, str(x.dtype).removeprefix("torch."))
    fits = x.dim() == len(shape) and all(n is None or n == found for n, found in zip(shape, x.shape, strict=True))
    require(fits, argument, f"shape {['any' if n is None else n for n in shape]}", f"shape {list(x.shape)}")
    require(x.is_contiguous(), argument, "a contiguous tensor", f"strides {x.stride()}; call .contiguous()")
    if like is not None:
        require(x.device == like.device, argument, f"device {like.device}", x.device)


def vectors(like: Tensor, mask_N: Tensor | None, **named: Tensor | None) -> None:
    """Float tensors of the length and on the device of `like`, [N] or [N, D], finite wherever the mask counts them."""
    if mask_N is not None:
        tensor("mask_N", mask_N, [len(like)], [torch.bool], like=like)
    for argument, x_N in named.items():
        if x_N is not None:
            tensor(argument, x_N, [len(like)], like=like)
            finite(argument, x_N, mask_N)


def is_finite(x_N: Tensor) -> bool:
    """Whether all of it is, or could be: True on a GPU, which is not asked."""
    # One fast reduction: a sum is finite only if all terms are. One that overflowed is a false alarm.
    return x_N.is_cuda or x_N.is_meta or not x_N.numel() or math.isfinite(float(x_N.detach().sum()))


def finite(argument: str, x_N: Tensor, mask_N: Tensor | None = None) -> None:
    if is_finite(x_N):
        return
    bad_N = ~torch.isfinite(x_N.detach())
    if mask_N is not None:
        bad_N &= mask_N
    where = bad_N.nonzero()
    if len(where):
        at = int(where[0, 0])
        raise ValueError(f"{argument}: expected finite numbers, found {float(x_N[at])} at index {at}")


def targets(argument: str, targets_N: Any, like_NX: Tensor, num_classes: int, mask_N: Tensor | None = None) -> None:
    tensor(argument, targets_N, [len(like_NX)], INTEGERS, like=like_NX)
    if targets_N.is_cuda or targets_N.is_meta or not len(targets_N):
        return
    low, high = (int(x) for x in targets_N.aminmax())
    if (low < 0 or high >= num_classes) and mask_N is not None:
        kept_M = targets_N[mask_N]
        low, high = (int(x) for x in kept_M.aminmax()) if len(kept_M) else (0, 0)
    require(low >= 0 and high < num_classes, argument, f"indices in [0, {num_classes})", f"{low} to {high}")


def cu_seqlens(argument: str, x_B1: Any, like_N: Tensor) -> None:
    tensor(argument, x_B1, [None], [torch.int32], like=like_N)
    require(len(x_B1) >= 1, argument, "at least one element", "none")
    if x_B1.is_cuda or x_B1.is_meta:
        return
    first, last = int(x_B1[0]), int(x_B1[-1])
    require(first == 0 and last == len(like_N), argument, f"to run from 0 to {len(like_N)}", f"{first} to {last}")
    require(bool((x_B1[1:] >= x_B1[:-1]).all()), argument, "a sequence that never falls", x_B1.tolist()[:16])


def denominator(x: float | Tensor, like_N: Tensor) -> Tensor:
    """A number, [] or [N]: by what each token's loss is divided. Becomes a float tensor on the device of `like_N`."""
    if isinstance(x, Tensor):
        tensor("denominator", x, [len(like_N)] if x.dim() else [], [torch.float32, torch.float64], like=like_N)
        if not x.is_cuda and not x.is_meta and x.numel():
            require(bool((x > 0).all()), "denominator", "positive numbers", float(x.min()))
        return x.detach()
    positive("denominator", x)
    dtype = torch.float64 if like_N.dtype == torch.float64 else torch.float32
    return torch.full((), float(x), dtype=dtype, device=like_N.device)


def number(argument: str, x: Any, low: float, high: float) -> None:
    is_number = isinstance(x, int | float) and not isinstance(x, bool)
    require(is_number and low <= x <= high, argument, f"a number in [{low}, {high}]", x)


def positive(argument: str, x: Any) -> None:
    is_number = isinstance(x, int | float) and not isinstance(x, bool)
    require(is_number and math.isfinite(x) and x > 0, argument, "a positive finite number", x)


def whole(argument: str, x: Any, low: int) -> None:
    require(isinstance(x, int) and not isinstance(x, bool) and x >= low, argument, f"an integer of at least {low}", x)


def policy(
    clip_low: float, clip_high: float, dual_clip: float | None, behaviour_cap: float | None, has_proximal: bool
) -> None:
    number("clip_low", clip_low, 0.0, 1.0)
    number("clip_high", clip_high, 0.0, math.inf)
    if dual_clip is not None:
        number("dual_clip", dual_clip, 1.0 + clip_high, math.inf)
    if behaviour_cap is not None:
        positive("behaviour_cap", behaviour_cap)
        require(has_proximal, "behaviour_cap", "proximal_logprobs_N beside it: the weight is proximal / sampled", None)
