"""RMSNorm and the gate of SwiGLU, each formula as it is written."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(x_ND: Tensor, weight_D: Tensor, eps: float, threads: int) -> tuple[Tensor, Tensor]:
    inverse_N = torch.rsqrt(x_ND.square().mean(-1) + eps)
    return weight_D * (x_ND * inverse_N[:, None]), inverse_N


def rms_norm_backward(
    x_ND: Tensor, weight_D: Tensor, inverse_N: Tensor, grad_ND: Tensor, threads: int
) -> tuple[Tensor, Tensor]:
    inverse_N1 = inverse_N[:, None]
    slope_ND = grad_ND * weight_D
    along_N1 = (slope_ND * x_ND).mean(-1, keepdim=True)
    grad_x_ND = slope_ND * inverse_N1 - x_ND * (along_N1 * inverse_N1**3)
    return grad_x_ND, (grad_ND * x_ND * inverse_N1).sum(0)


def silu_mul_forward(gate: Tensor, up: Tensor, threads: int) -> Tensor:
    return gate * gate.sigmoid() * up


def silu_mul_backward(gate: Tensor, up: Tensor, grad: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu
