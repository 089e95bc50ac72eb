"""Sampling by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits_RV: Tensor, temperatures_R: Tensor, uniforms_R: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    logprobs_RV = torch.log_softmax(logits_RV.float() / temperatures_R[:, None], dim=-1)
    # softmax rather than exp: it works row by row, so that no row is the one with the odd elements at the end.
    cdf_RV = torch.softmax(logprobs_RV, dim=-1).cumsum(-1, dtype=torch.float64)
    tokens_R1 = torch.searchsorted(cdf_RV, uniforms_R[:, None] * cdf_RV[:, -1:], right=True)
    # Only a row of NaN can point beyond the end; its log-prob then says so.
    tokens_R1.clamp_(max=logits_RV.shape[1] - 1)
    return tokens_R1[:, 0], logprobs_RV.gather(1, tokens_R1)[:, 0]
