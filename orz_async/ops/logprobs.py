"""Log-probabilities and entropy of chosen tokens, from logits or straight from the LM head; differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orz_async.ops import backend, checks


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, temperature: float, in_place: bool) -> Any:
        logprobs_N, entropy_N, lse_N = backend.for_tensor(logits_NV).logprob_forward(logits_NV, targets_N, temperature)
        ctx.save_for_backward(logits_NV, targets_N, lse_N, entropy_N)
        ctx.temperature, ctx.in_place = temperature, in_place
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> Any:
        logits_NV, targets_N, lse_N, entropy_N = ctx.saved_tensors
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(lse_N)
        grad_logits_NV = backend.for_tensor(logits_NV).logprob_backward(
            logits_NV,
            targets_N,
            lse_N,
            entropy_N,
            grad_logprobs_N.contiguous(),
            None if grad_entropy_N is None else grad_entropy_N.contiguous(),
            ctx.temperature,
            ctx.in_place,
        )
        return grad_logits_NV, None, None, None


class _HeadLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, chunk: int | None
    ) -> Any:
        logprobs_N, entropy_N, lse_N = backend.for_tensor(hidden_ND).head_logprob_forward(
            hidden_ND, weight_VD, targets_N, temperature, chunk
        )
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N, entropy_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> Any:
        hidden_ND, weight_VD, targets_N, lse_N, entropy_N = ctx.saved_tensors
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(lse_N)
        grad_hidden_ND, grad_weight_VD = backend.for_tensor(hidden_ND).head_logprob_backward(
            hidden_ND,
            weight_VD,
            targets_N,
            lse_N,
            entropy_N,
            grad_logprobs_N.contiguous(),
            None if grad_entropy_N is None else grad_entropy_N.contiguous(),
            ctx.temperature,
            ctx.chunk,
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
        )
        return grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype), None, None, None


def logprob(
    logits_NV: Tensor, targets_N: Tensor, *, temperature: float = 1.0, backward_in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[target] and the entropy of the softmax: (logprobs_N, entropy_N), float32.

    Logits of -inf are legal. With `backward_in_place` the gradient overwrites the logits: half the memory, and nothing
    else may need them afterwards.
    """
    checks.tensor("logits_NV", logits_NV, [None, None])
    checks.targets("targets_N", targets_N, logits_NV, logits_NV.shape[1])
    checks.positive("temperature", temperature)
    if backward_in_place and logits_NV.requires_grad:
        checks.require(not logits_NV.is_leaf, "backward_in_place", "logits that a model computed", "a leaf tensor")
    logprobs_N, entropy_N = _Logprob.apply(logits_NV, targets_N.long(), float(temperature), backward_in_place)  # type: ignore[no-untyped-call]
    return logprobs_N, entropy_N


def head_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """`logprob(hidden @ weight.T, targets)` without ever holding [N, V]: `chunk` rows at a time.

    The logits are float32 at least, whatever the dtype of hidden and weight; backward makes them a second time.
    """
    check_head(hidden_ND, weight_VD, targets_N, temperature, chunk, None)
    logprobs_N, entropy_N = _HeadLogprob.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N.long(), float(temperature), chunk
    )
    return logprobs_N, entropy_N


def check_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float,
    chunk: int | None,
    mask_N: Tensor | None,
) -> None:
    checks.tensor("hidden_ND", hidden_ND, [None, None])
    checks.tensor("weight_VD", weight_VD, [None, hidden_ND.shape[1]], [hidden_ND.dtype], like=hidden_ND)
    if mask_N is not None:
        checks.tensor("mask_N", mask_N, [len(hidden_ND)], [torch.bool], like=hidden_ND)
    checks.targets("targets_N", targets_N, hidden_ND, len(weight_VD), mask_N)
    checks.positive("temperature", temperature)
    if chunk is not None:
        checks.whole("chunk", chunk, 1)
