"""Sampling by (seed, position, probabilities) alone: the other rows of a batch cannot change a token."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def sample(logits_BV: Tensor, temperatures_B: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (int64) by inverse CDF and their log-probs (float32), not finite where a row's logits are not.

    The CDF is summed in float64: in float32 it would be off by more than the probability of a rare token. A uniform
    below 1 - 2**-52 times the total stays below the total after rounding, so the index exists and its probability is
    positive.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float() / temperatures_B[:, None], dim=-1)
    # softmax rather than exp: it works row by row, so that no row is the one with the odd elements at the end.
    cdf_BV = torch.softmax(logprobs_BV, dim=-1).cumsum(-1, dtype=torch.float64)
    thresholds_B1 = uniforms_B[:, None] * cdf_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cdf_BV, thresholds_B1, right=True)
    # Only a row of NaN can point beyond the end; its log-prob then says so.
    tokens_B1.clamp_(max=logits_BV.shape[1] - 1)
    return tokens_B1[:, 0], logprobs_BV.gather(1, tokens_B1)[:, 0]
