"""One token a row, and its log-prob."""

from __future__ import annotations

import torch
from torch import Tensor

from orz_async.ops import backend, checks, reference


def sample(logits_RV: Tensor, temperatures_R: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (int64) by inverse CDF of softmax(logits / temperature), and their log-probs (float32).

    `temperatures_R` is float32 and positive, `uniforms_R` float64. A token is the first whose cumulated probability
    exceeds its row's uniform. Both sums are float64: in float32 the CDF would be off by more than the probability of a
    rare token. A uniform in [0, 1 - 2**-52] times the total stays below the total after rounding, so there is such a
    token, and its probability is positive. Where a row is not finite, so is the log-prob, and the token is some index.
    """
    rows = [len(logits_RV)]
    checks.require(logits_RV.dim() == 2 and logits_RV.shape[1] >= 1, "logits_RV", "[rows, vocabulary]", logits_RV.shape)
    checks.tensor("temperatures_R", temperatures_R, rows, [torch.float32], like=logits_RV)
    checks.tensor("uniforms_R", uniforms_R, rows, [torch.float64], like=logits_RV)
    on_host = logits_RV.device.type == "cpu" and logits_RV.dtype == torch.float32
    serving = backend.selected().host if on_host else reference
    made: tuple[Tensor, Tensor] = serving.sample(logits_RV, temperatures_R, uniforms_R, torch.get_num_threads())
    return made
