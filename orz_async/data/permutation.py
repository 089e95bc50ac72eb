"""A keyed permutation of 0..n-1 that needs no table and no generator state.

A Feistel network permutes the smallest domain of 4**k >= n values; a value that lands outside 0..n-1 is permuted again
until it lands inside ("cycle walking"), which leaves a permutation of 0..n-1. It is defined by integer arithmetic
alone, so the order is the same on every machine and with every library version. Expected cost: less than four walks.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix64(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that scatters every bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permuted(position: int, n: int, *, key: tuple[int, int]) -> int:
    """Where the permutation named by `key` sends `position`; for each key a bijection of range(n)."""
    assert 0 <= position < n, f"position {position} is outside range({n})"
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    secret = mix64(mix64(key[0] & _MASK) ^ (key[1] & _MASK))
    value = position
    while True:
        left, right = value >> half, value & low
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (mix64(secret ^ (round_number << 56) ^ right) & low)
        value = left << half | right
        if value < n:
            return value
