"""avg@k and pass@k over problems with several samples each, and how sure one can be of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    value: float
    low: float
    high: float
    """95 % interval."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k samples is right at least, unbiased: 1 - C(n - c, k) / C(n, k).

    With n samples of which c are right (arXiv:2107.03374 eq. 1). ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(f"expected 1 <= k <= n and 0 <= c <= n, found n {num_samples}, c {num_correct}, k {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def average(num_samples: int, correct: Sequence[int]) -> Estimate:
    """avg@k: the mean over problems of the share of right samples. Interval as of `interval`."""
    return interval([c / num_samples for c in correct])


def best_of(num_samples: int, correct: Sequence[int], k: int) -> Estimate:
    """pass@k: the mean over problems."""
    return interval([pass_at_k(num_samples, c, k) for c in correct])


def interval(scores: Sequence[float], *, draws: int = 2000) -> Estimate:
    """Mean of scores in [0, 1] and its 95 % interval over problems.

    Scores that are all 0 or 1 are counts: Wilson's interval. Else problems are drawn anew with replacement, the
    samples of a problem staying together (a cluster bootstrap), from a fixed seed: equal scores give equal intervals.
    """
    count, mean = len(scores), math.fsum(scores) / len(scores)
    if all(s in (0.0, 1.0) for s in scores):
        z = 1.959964
        middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
        half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)) / (1 + z * z / count)
        return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half))
    values = np.asarray(scores)
    rng = np.random.default_rng(0)
    means = [float(values[rng.integers(0, count, count)].mean()) for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))
