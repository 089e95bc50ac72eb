"""Sequences into microbatches, microbatches onto ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orz_async.ops import backend, checks


def pack(
    lengths_B: Sequence[int], *, max_tokens: int, num_ranks: int = 1, cost: tuple[float, float] = (1.0, 0.0)
) -> list[list[list[int]]]:
    """[rank][microbatch][index]: every index exactly once, every rank the same number of microbatches.

    A microbatch holds at most `max_tokens`, except that a longer sequence has one of its own; ranks with fewer get
    empty ones at the end. Ranks are balanced by the sum of a * L + b * L^2, `cost` = (a, b). Deterministic.
    """
    checks.whole("max_tokens", max_tokens, 1)
    checks.whole("num_ranks", num_ranks, 1)
    checks.require(len(cost) == 2, "cost", "two numbers (a, b)", cost)
    for name, x in zip(("cost[0]", "cost[1]"), cost, strict=True):
        checks.number(name, x, 0.0, 1e12)
    checks.require(sum(cost) > 0, "cost", "at least one positive number", cost)
    lengths = np.asarray(lengths_B)
    if lengths.size:
        checks.require(lengths.ndim == 1, "lengths_B", "one dimension", f"{lengths.ndim}")
        checks.require(lengths.dtype.kind in "iu", "lengths_B", "whole numbers", lengths.dtype)
        checks.require(int(lengths.min()) > 0, "lengths_B", "positive lengths", lengths.min())
        checks.require(int(lengths.max()) < 2**31, "lengths_B", "lengths below 2^31", lengths.max())
    lengths = np.ascontiguousarray(lengths, np.int64)
    packed: list[list[list[int]]] = backend.selected().host.pack(lengths, max_tokens, num_ranks, (cost[0], cost[1]))
    return packed
