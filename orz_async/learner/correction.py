"""What is done about rollouts that another policy sampled: the proximal policy and the mask, pure functions over R.

A token's behaviour policy is the engine at the version that sampled it. Staleness and the mismatch between engine and
learner look alike from here: both are a difference of log-probs, and both are corrected, or left out, alike.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def proximal_mix(lag_R: NDArray[np.int32]) -> Tensor:
    """Share of the sampled log-prob in an interpolated proximal one: 0 at lag 0, 1 / lag above (arXiv:2512.06547).

    log proximal = mix * log sampled + (1 - mix) * log current, detached. At lag 1 the proximal policy is the one that
    sampled; the staler a token, the nearer to the current policy is the centre of its clip range. No forward pass.
    """
    lag = torch.from_numpy(lag_R).float()
    return torch.where(lag > 0, 1.0 / lag.clamp(min=1.0), 0.0)


def keep_mask(
    logprobs_R: Tensor,
    sampled_logprobs_R: Tensor,
    lengths_B: Tensor,
    *,
    unit: Literal["token", "sequence"],
    above: float,
) -> Tensor:
    """bool [R]: tokens that take part in the policy loss.

    token: those with 1 / above <= probability now / when sampled <= above. sequence: all tokens of the rollouts whose
    geometric mean of that ratio is in these bounds. What is left out still counts in the denominators: the others do
    not gain weight by it. log-probs are those of the policy at the start of the step.
    """
    delta_R = (logprobs_R - sampled_logprobs_R).double()
    bound = float(np.log(above))
    if unit == "token":
        return delta_R.abs() <= bound
    of_R = torch.arange(len(lengths_B), device=delta_R.device).repeat_interleave(lengths_B.to(delta_R.device))
    sums_B = delta_R.new_zeros(len(lengths_B)).index_add_(0, of_R, delta_R)
    return ((sums_B / lengths_B.to(sums_B)).abs() <= bound)[of_R]
