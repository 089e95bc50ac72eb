"""The elementwise parts of a Llama-like layer in host memory: one pass where torch on a CPU makes five to ten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orz_async.ops import backend, checks


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_ND, inverse_N = backend.selected().host.rms_norm_forward(x_ND, weight_D, eps, torch.get_num_threads())
        ctx.save_for_backward(x_ND, weight_D, inverse_N)
        made: Tensor = out_ND
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        x_ND, weight_D, inverse_N = ctx.saved_tensors
        threads = torch.get_num_threads()
        return *backend.selected().host.rms_norm_backward(
            x_ND, weight_D, inverse_N, grad_ND.contiguous(), threads
        ), None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        made: Tensor = backend.selected().host.silu_mul_forward(gate, up, torch.get_num_threads())
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return backend.selected().host.silu_mul_backward(gate, up, grad.contiguous(), torch.get_num_threads())


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) by row (Zhang and Sennrich 2019, eq. 4): [N, D], float32, in host memory.

    Differentiable. The bits depend on no number of threads, and a row's on no other row.
    """
    checks.tensor("x_ND", x_ND, [None, None], [torch.float32])
    checks.tensor("weight_D", weight_D, [x_ND.shape[1]], [torch.float32])
    checks.require(x_ND.device.type == weight_D.device.type == "cpu", "x_ND and weight_D", "host memory", x_ND.device)
    made: Tensor = _RmsNorm.apply(x_ND, weight_D, float(eps))  # type: ignore[no-untyped-call]
    return made


def silu_mul(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) * up, the gate of SwiGLU (Shazeer 2020, eq. 6): [N, F], float32, in host memory. Differentiable."""
    checks.tensor("gate_NF", gate_NF, [None, None], [torch.float32])
    checks.tensor("up_NF", up_NF, list(gate_NF.shape), [torch.float32])
    checks.require(gate_NF.device.type == up_NF.device.type == "cpu", "gate_NF, up_NF", "host memory", gate_NF.device)
    made: Tensor = _SiluMul.apply(gate_NF, up_NF)  # type: ignore[no-untyped-call]
    return made
