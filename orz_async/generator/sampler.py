"""Draws by (seed, position) alone: the other rows of a batch cannot change a token. See `ops.sample` for the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that passes BigCrush."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniforms(seeds_B: NDArray[np.uint64], positions_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 in [0, 1 - 2**-52]: the draw of each seed for the response token at this position.

    The seed is mixed before the position is added: neighbouring seeds would otherwise share a shifted stream.
    """
    stream_B = _splitmix64(seeds_B + _GOLDEN)
    bits_B = _splitmix64(stream_B + (positions_B.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits_B >> np.uint64(12)).astype(np.float64) * 2.0**-52
