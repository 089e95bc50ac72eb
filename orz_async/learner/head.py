"""The LM head of the policy: the fused ops, or chunk by chunk where the family caps its logits (Gemma 2).

The fused head multiplies by the LM weight and nothing more. A cap, z -> cap * tanh(z / cap), comes between product and
softmax; then each chunk of rows is computed and computed again for its gradient, so that [M, V] is never held either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from orz_async import ops
from orz_async.ops.stats import PPO_FIELDS

CHUNK_ELEMENTS = 2**24
"""Of one [C, V] buffer, as in the reference ops."""


def logprobs(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, *, temperature: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """(logprobs_M, entropy_M) of softmax(cap(hidden @ weight.T) / temperature), float32 at least."""
    if cap is None:
        return ops.head_logprob(hidden_MD, weight_VD, targets_M, temperature=temperature)
    rows = max(1, CHUNK_ELEMENTS // len(weight_VD))
    parts = [
        checkpoint(_capped, hidden_CD, weight_VD, targets_C, temperature, cap, use_reentrant=False)
        for hidden_CD, targets_C in zip(torch.split(hidden_MD, rows), torch.split(targets_M, rows), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _capped(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, temperature: float, cap: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden_CD.dtype, torch.float32)
    logits_CV = torch.tanh((hidden_CD.to(wide) @ weight_VD.to(wide).T) / cap) * cap
    return ops.logprob(logits_CV, targets_C, temperature=temperature)


def ppo(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    sampled_logprobs_M: Tensor,
    advantages_M: Tensor,
    *,
    temperature: float,
    cap: float | None,
    **settings: Any,
) -> ops.PpoHeadOutput:
    """`ops.ppo_head`, or the same loss behind capped logits. `settings` are those of `ops.ppo_loss`."""
    if cap is None:
        return ops.ppo_head(
            hidden_MD, weight_VD, targets_M, sampled_logprobs_M, advantages_M, temperature=temperature, **settings
        )
    logprobs_M, entropy_M = logprobs(hidden_MD, weight_VD, targets_M, temperature=temperature, cap=cap)
    if not bool(logprobs_M.detach().isfinite().all()):
        # The fused head says so by its loss too, which every rank sees in the sum.
        nothing = ops.PpoStats.from_vector(torch.zeros(len(PPO_FIELDS), dtype=torch.float64))
        return ops.PpoHeadOutput(logprobs_M.sum() * float("nan"), logprobs_M.detach(), entropy_M.detach(), nothing)
    loss, stats = ops.ppo_loss(logprobs_M, sampled_logprobs_M, advantages_M, entropy_N=entropy_M.detach(), **settings)
    return ops.PpoHeadOutput(loss, logprobs_M.detach(), entropy_M.detach(), stats)
