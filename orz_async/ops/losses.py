"""The losses of PPO. Each is a sum over tokens divided by a denominator the caller counted over all microbatches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orz_async.ops import backend, checks
from orz_async.ops.logprobs import check_head
from orz_async.ops.stats import PpoHeadOutput, PpoStats, ValueStats


def _with_gradient(loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor) -> Tensor:
    result: Tensor = _WithGradient.apply(loss, gradients, *inputs)  # type: ignore[no-untyped-call]
    return result


class _WithGradient(torch.autograd.Function):
    """Hands out a loss whose gradients with respect to `inputs` are already known.

    They are scaled in place by the incoming gradient, so that a weight's is never held twice: one backward per forward.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [x.dtype for x in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("this loss has been differentiated before: its gradients are used up, compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return (
            None,
            None,
            *(
                None if g is None else g.mul_(grad_loss).to(dtype)
                for g, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
        )


def ppo_loss(
    logprobs_N: Tensor,
    sampled_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    proximal_logprobs_N: Tensor | None = None,
    entropy_N: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    behaviour_cap: float | None = None,
    mask_N: Tensor | None = None,
    denominator: float | Tensor,
) -> tuple[Tensor, PpoStats]:
    """The clipped policy loss, sum over tokens of -weight * min(ratio * A, clip(ratio) * A) / denominator.

    Without `proximal_logprobs_N`, ratio = current / sampled and weight = 1: clipping around the policy that sampled.
    With it, ratio = current / proximal and weight = proximal / sampled, at most `behaviour_cap`: the decoupled
    objective. `entropy_N` is for the statistics only. `denominator` is one number, or one per token. Gradients flow to
    `logprobs_N` alone.
    """
    checks.tensor("logprobs_N", logprobs_N, [None])
    checks.vectors(
        logprobs_N,
        mask_N,
        logprobs_N=logprobs_N,
        sampled_logprobs_N=sampled_logprobs_N,
        advantages_N=advantages_N,
        proximal_logprobs_N=proximal_logprobs_N,
        entropy_N=entropy_N,
    )
    checks.policy(clip_low, clip_high, dual_clip, behaviour_cap, proximal_logprobs_N is not None)
    with torch.no_grad():
        loss, slope_N, sums = backend.for_tensor(logprobs_N).ppo_loss(
            logprobs_N,
            sampled_logprobs_N,
            advantages_N,
            proximal_logprobs_N,
            entropy_N,
            mask_N,
            checks.denominator(denominator, logprobs_N),
            clip_low,
            clip_high,
            dual_clip,
            behaviour_cap,
        )
    return _with_gradient(loss, (slope_N,), logprobs_N), PpoStats.from_vector(sums)


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    *,
    clip: float | None = 0.2,
    mask_N: Tensor | None = None,
    denominator: float | Tensor,
) -> tuple[Tensor, ValueStats]:
    """Sum over tokens of 0.5 * max((V - R)^2, (V_clipped - R)^2) / denominator, V_clipped within `clip` of the old V.

    `clip=None` is the plain squared error. Gradients flow to `values_N` alone.
    """
    checks.tensor("values_N", values_N, [None])
    checks.vectors(values_N, mask_N, values_N=values_N, old_values_N=old_values_N, returns_N=returns_N)
    if clip is not None:
        checks.positive("clip", clip)
    with torch.no_grad():
        loss, slope_N, sums = backend.for_tensor(values_N).value_loss(
            values_N, old_values_N, returns_N, mask_N, checks.denominator(denominator, values_N), clip
        )
    return _with_gradient(loss, (slope_N,), values_N), ValueStats.from_vector(sums)


def ppo_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    sampled_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    temperature: float = 1.0,
    proximal_logprobs_N: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    behaviour_cap: float | None = None,
    mask_N: Tensor | None = None,
    denominator: float | Tensor,
    chunk: int | None = None,
) -> PpoHeadOutput:
    """`ppo_loss(*head_logprob(hidden, weight, targets))` in one pass, gradients of hidden and weight included.

    The gradients are made beside the softmax they need (if grad mode is on and someone wants them), so the logits are
    neither kept nor made twice. Rows where `mask_N` is False cost nothing. The loss can be differentiated once.
    """
    check_head(hidden_ND, weight_VD, targets_N, temperature, chunk, mask_N)
    checks.vectors(
        hidden_ND,
        mask_N,
        sampled_logprobs_N=sampled_logprobs_N,
        advantages_N=advantages_N,
        proximal_logprobs_N=proximal_logprobs_N,
    )
    checks.policy(clip_low, clip_high, dual_clip, behaviour_cap, proximal_logprobs_N is not None)
    learns = torch.is_grad_enabled()
    with torch.no_grad():
        loss, grad_hidden_ND, grad_weight_VD, logprobs_N, entropy_N, sums = backend.for_tensor(hidden_ND).ppo_head(
            hidden_ND,
            weight_VD,
            targets_N.long(),
            sampled_logprobs_N,
            advantages_N,
            proximal_logprobs_N,
            mask_N,
            checks.denominator(denominator, hidden_ND),
            clip_low,
            clip_high,
            dual_clip,
            behaviour_cap,
            float(temperature),
            chunk,
            learns and hidden_ND.requires_grad,
            learns and weight_VD.requires_grad,
        )
    loss = _with_gradient(loss, (grad_hidden_ND, grad_weight_VD), hidden_ND, weight_VD)
    return PpoHeadOutput(loss, logprobs_N, entropy_N, PpoStats.from_vector(sums))
