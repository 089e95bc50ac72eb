"""Microbatches of bounded size, balanced over ranks. `csrc/cpu/pack.h` is the same algorithm, decision by decision."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Swaps per rank. Differencing leaves little to do; this bounds the worst case.
REFINE_ROUNDS = 64


def partition(costs_B: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Karmarkar-Karp, k-way: repeatedly join the two least even partial partitions, heaviest to lightest.

    Equal spreads are joined in the order they arose and equal sums keep their order, so nothing is left to chance.
    """
    if num_ranks == 1 or not costs_B:
        return [list(range(len(costs_B)))] + [[] for _ in range(num_ranks - 1)]
    heap = []
    for index, cost in enumerate(costs_B):
        members: list[list[int]] = [[] for _ in range(num_ranks - 1)]
        heap.append((-cost, index, [0.0] * (num_ranks - 1) + [cost], [*members, [index]]))
    heapq.heapify(heap)
    for joined in range(len(costs_B), 2 * len(costs_B) - 1):
        _, _, left_sums, left = heapq.heappop(heap)
        _, _, right_sums, right = heapq.heappop(heap)
        sums = [a + b for a, b in zip(left_sums, reversed(right_sums), strict=True)]
        members = [a + b for a, b in zip(left, reversed(right), strict=True)]
        order = sorted(range(num_ranks), key=sums.__getitem__)
        sums, members = [sums[i] for i in order], [members[i] for i in order]
        heapq.heappush(heap, (sums[0] - sums[-1], joined, sums, members))
    return heap[0][3]


def best_exchange(heavy: list[tuple[float, int]], light: list[tuple[float, int]], gap: float) -> tuple[int, int] | None:
    """Positions of the item to give and the item to take (-1: none) that leave the smallest gap, if any narrows it.

    Both lists ascend by cost, so the partner nearest to cost - gap / 2 only moves right: one sweep.
    """
    best, left_over, at = None, gap, -1
    for give, (cost, _) in enumerate(heavy):
        while at + 1 < len(light) and light[at + 1][0] <= cost - gap / 2:
            at += 1
        for take in (at, at + 1):
            if take < len(light):
                delta = cost - (light[take][0] if take >= 0 else 0.0)
                if abs(gap - 2 * delta) < left_over:
                    best, left_over = (give, take), abs(gap - 2 * delta)
    return best


def refine(ranks: list[list[int]], costs_B: Sequence[float]) -> list[list[int]]:
    """Move or swap items between the heaviest and the lightest rank while that brings the two closer."""
    sorted_ranks = [sorted((costs_B[i], i) for i in rank) for rank in ranks]
    loads = [0.0] * len(ranks)
    for rank, items in enumerate(sorted_ranks):
        for cost, _ in items:
            loads[rank] += cost
    for _ in range(REFINE_ROUNDS * len(ranks)):
        high, low = loads.index(max(loads)), loads.index(min(loads))
        exchange = best_exchange(sorted_ranks[high], sorted_ranks[low], loads[high] - loads[low])
        if exchange is None:
            break
        give, take = exchange
        given = sorted_ranks[high].pop(give)
        taken = sorted_ranks[low].pop(take) if take >= 0 else None
        insort(sorted_ranks[low], given)
        if taken is not None:
            insort(sorted_ranks[high], taken)
        delta = given[0] - (taken[0] if taken else 0.0)
        loads[high] -= delta
        loads[low] += delta
    return [[i for _, i in items] for items in sorted_ranks]


def first_fit_decreasing(rank: list[int], lengths_B: Sequence[int], max_tokens: int) -> list[list[int]]:
    """At most 11/9 of the fewest microbatches possible, plus one. A longer sequence has one to itself."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(rank, key=lambda i: (-lengths_B[i], i)):
        length = lengths_B[index]
        for number, left in enumerate(room):
            if length <= left:
                bins[number].append(index)
                room[number] -= length
                break
        else:
            bins.append([index])
            room.append(max_tokens - length)
    return [sorted(members) for members in bins]


def pack(
    lengths_B: NDArray[np.int64], max_tokens: int, num_ranks: int, cost: tuple[float, float]
) -> list[list[list[int]]]:
    """[rank][microbatch][index into lengths], heaviest microbatch first; a sequence costs a * L + b * L^2."""
    lengths: list[int] = lengths_B.tolist()
    linear, square = cost
    costs_B = [linear * float(n) + square * (float(n) * float(n)) for n in lengths]
    packed = []
    for rank in refine(partition(costs_B, num_ranks), costs_B):
        bins = first_fit_decreasing(rank, lengths, max_tokens)
        heavy = [0.0] * len(bins)
        for number, members in enumerate(bins):
            for index in members:
                heavy[number] += costs_B[index]
        packed.append([bins[k] for k in sorted(range(len(bins)), key=lambda k: (-heavy[k], bins[k][0]))])
    most = max(map(len, packed))
    return [bins + [[] for _ in range(most - len(bins))] for bins in packed]
