"""Log-probs from logits, from the LM head, and the PPO loss straight from the LM head, chunk by chunk.

Scratch is a chunk or two of [C, V] whatever N is. Math is float32 at least: log-probs from bfloat16 logits are wrong by
up to 0.09, half a clip range. What is done to a chunk of logits is a parameter, `RowMath`, so that the C++ backend
shares the loops and the matrix products and replaces only what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orz_async.ops.reference.loss import ppo_loss, wide

# Elements of one [C, V] scratch buffer: 64 MiB of float32.
CHUNK_ELEMENTS = 2**24
# exp of this is 0 in float64 too, and no product with it overflows float32.
LOG_FLOOR = -1e4


class Softmax(NamedTuple):
    """Of one chunk of logits. `exp` is exp(z - max), `total` its sum over the vocabulary."""

    exp_CV: Tensor
    total_C: Tensor
    logprobs_C: Tensor
    entropy_C: Tensor
    logsumexp_C: Tensor


class SoftmaxPass(Protocol):
    """With `consume`, `exp` overwrites the logits; without, they stay as they are and `exp` may be anything."""

    def __call__(self, logits_CV: Tensor, targets_C: Tensor, temperature: float, consume: bool) -> Softmax: ...


class GradientPass(Protocol):
    """Into `out`, which may be the logits: the gradient of sum(g_logprobs * logprobs + g_entropy * entropy)."""

    def __call__(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        logsumexp_C: Tensor,
        entropy_C: Tensor,
        grad_logprobs_C: Tensor,
        grad_entropy_C: Tensor | None,
        temperature: float,
        out_CV: Tensor,
    ) -> None: ...


class RowMath(NamedTuple):
    softmax: SoftmaxPass
    gradient: GradientPass
    policy: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """The backend's `ppo_loss`."""


def softmax_pass(logits_CV: Tensor, targets_C: Tensor, temperature: float, consume: bool) -> Softmax:
    """A logit of -inf is legal: its p log p is 0 * -inf, whose limit is 0."""
    z_CV = logits_CV.div_(temperature) if consume else wide(logits_CV) / temperature
    top_C = z_CV.amax(1)
    z_CV.sub_(top_C[:, None])
    picked_C = z_CV.gather(1, targets_C[:, None]).squeeze(1)
    weighted_CV = z_CV.exp().mul_(z_CV.clamp(min=LOG_FLOOR))
    exp_CV = z_CV.exp_()
    total_C = exp_CV.sum(1)
    log_total_C = total_C.log()
    entropy_C = log_total_C - weighted_CV.sum(1).div_(total_C)
    return Softmax(exp_CV, total_C, picked_C - log_total_C, entropy_C, top_C + log_total_C)


def gradient_pass(
    logits_CV: Tensor,
    targets_C: Tensor,
    logsumexp_C: Tensor,
    entropy_C: Tensor,
    grad_logprobs_C: Tensor,
    grad_entropy_C: Tensor | None,
    temperature: float,
    out_CV: Tensor,
) -> None:
    """d logprob / d z = onehot - p and d entropy / d z = -p (log p + entropy), z the logits over the temperature."""
    log_p_CV = (wide(logits_CV) / temperature).sub_(logsumexp_C[:, None])
    slope_C = grad_logprobs_C.to(log_p_CV.dtype) / temperature
    p_CV = log_p_CV.exp()
    if grad_entropy_C is None:
        dz_CV = p_CV.mul_(-slope_C[:, None])
    else:
        g_C = grad_entropy_C.to(log_p_CV.dtype) / temperature
        log_p_CV.clamp_(min=LOG_FLOOR).add_(entropy_C[:, None])
        dz_CV = p_CV.mul_(log_p_CV.mul_(-g_C[:, None]).sub_(slope_C[:, None]))
    out_CV.copy_(dz_CV.scatter_add_(1, targets_C[:, None], slope_C[:, None]))


TORCH = RowMath(softmax_pass, gradient_pass, ppo_loss)


def chunk_rows(num_rows: int, num_columns: int, chunk: int | None) -> int:
    return min(max(num_rows, 1), chunk or max(1, CHUNK_ELEMENTS // max(num_columns, 1)))


def chunks(num_rows: int, num_columns: int, chunk: int | None) -> Iterator[slice]:
    rows = chunk_rows(num_rows, num_columns, chunk)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


class Head:
    """Logits of one chunk after the other, in one buffer: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self, weight_VD: Tensor, num_rows: int, chunk: int | None) -> None:
        self.weight_VD = wide(weight_VD)
        self.logits_CV = self.weight_VD.new_empty((chunk_rows(num_rows, len(weight_VD), chunk), len(weight_VD)))

    def logits(self, x_CD: Tensor) -> Tensor:
        return torch.mm(x_CD, self.weight_VD.T, out=self.logits_CV[: len(x_CD)])


def logprob_forward(
    logits_NV: Tensor, targets_N: Tensor, temperature: float, math: RowMath = TORCH
) -> tuple[Tensor, Tensor, Tensor]:
    out_3N = wide(logits_NV[:0]).new_empty((3, len(logits_NV)))
    for rows in chunks(len(logits_NV), logits_NV.shape[1], None):
        parts = math.softmax(logits_NV[rows], targets_N[rows], temperature, False)
        out_3N[:, rows] = torch.stack(parts[2:])
    return out_3N[0], out_3N[1], out_3N[2]


def logprob_backward(
    logits_NV: Tensor,
    targets_N: Tensor,
    logsumexp_N: Tensor,
    entropy_N: Tensor,
    grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None,
    temperature: float,
    in_place: bool,
    math: RowMath = TORCH,
) -> Tensor:
    grad_NV = logits_NV if in_place else torch.empty_like(logits_NV)
    for rows in chunks(len(logits_NV), logits_NV.shape[1], None):
        math.gradient(
            logits_NV[rows],
            targets_N[rows],
            logsumexp_N[rows],
            entropy_N[rows],
            grad_logprobs_N[rows],
            None if grad_entropy_N is None else grad_entropy_N[rows],
            temperature,
            grad_NV[rows],
        )
    return grad_NV


def head_logprob_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float,
    chunk: int | None,
    math: RowMath = TORCH,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight_VD, len(hidden_ND), chunk)
    out_3N = head.weight_VD.new_empty((3, len(hidden_ND)))
    for rows in chunks(len(hidden_ND), len(weight_VD), chunk):
        parts = math.softmax(head.logits(wide(hidden_ND[rows])), targets_N[rows], temperature, True)
        out_3N[:, rows] = torch.stack(parts[2:])
    return out_3N[0], out_3N[1], out_3N[2]


def head_logprob_backward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    logsumexp_N: Tensor,
    entropy_N: Tensor,
    grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None,
    temperature: float,
    chunk: int | None,
    need_hidden: bool,
    need_weight: bool,
    math: RowMath = TORCH,
) -> tuple[Tensor | None, Tensor | None]:
    head = Head(weight_VD, len(hidden_ND), chunk)
    grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
    grad_weight_VD = torch.zeros_like(head.weight_VD) if need_weight else None
    for rows in chunks(len(hidden_ND), len(weight_VD), chunk):
        x_CD = wide(hidden_ND[rows])
        dz_CV = head.logits(x_CD)
        math.gradient(
            dz_CV,
            targets_N[rows],
            logsumexp_N[rows],
            entropy_N[rows],
            grad_logprobs_N[rows],
            None if grad_entropy_N is None else grad_entropy_N[rows],
            temperature,
            dz_CV,
        )
        if grad_hidden_ND is not None:
            grad_hidden_ND[rows] = (dz_CV @ head.weight_VD).to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD.addmm_(dz_CV.T, x_CD)
    return grad_hidden_ND, grad_weight_VD


def _products(
    e_CV: Tensor,
    factor_C1: Tensor,
    x_CD: Tensor,
    weight_VD: Tensor,
    out_CD: Tensor | None,
    grad_weight_VD: Tensor | None,
    need_hidden: bool,
) -> Tensor | None:
    """(factor * e) @ W, into `out` if there is one, and (factor * e).T @ x added to the weight's gradient.

    The factor goes to the narrower side of the products, V or D wide: for a real vocabulary that saves a pass over e.
    """
    late = len(weight_VD) > x_CD.shape[1]
    if not late:
        e_CV.mul_(factor_C1)
    dx_CD = torch.mm(e_CV, weight_VD, out=out_CD) if need_hidden else None
    if late and dx_CD is not None:
        dx_CD.mul_(factor_C1)
    if grad_weight_VD is not None:
        grad_weight_VD.addmm_(e_CV.T, x_CD * factor_C1 if late else x_CD)
    return dx_CD


def ppo_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    sampled_logprobs_N: Tensor,
    advantages_N: Tensor,
    proximal_logprobs_N: Tensor | None,
    mask_N: Tensor | None,
    denominator: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    behaviour_cap: float | None,
    temperature: float,
    chunk: int | None,
    need_hidden: bool,
    need_weight: bool,
    math: RowMath = TORCH,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """With e = exp(z - max), S its sum and s the slope of a token's loss, its logits' gradient is s * (onehot - e / S),
    and s depends on nothing but that token's log-probs and advantage: known as soon as its softmax is. So each chunk's
    gradients are made while its softmax is at hand, and no logits are kept or made twice.
    """
    kept_M = None if mask_N is None else mask_N.nonzero().squeeze(1)
    clip = (clip_low, clip_high, dual_clip, behaviour_cap)
    num_rows = len(hidden_ND) if kept_M is None else len(kept_M)
    head = Head(weight_VD, num_rows, chunk)
    logprobs_N, entropy_N = head.weight_VD.new_zeros((2, len(hidden_ND))).unbind()
    new_hidden = torch.empty_like if kept_M is None else torch.zeros_like
    grad_hidden_ND = new_hidden(hidden_ND) if need_hidden else None
    grad_weight_VD = torch.zeros_like(head.weight_VD) if need_weight else None
    for span in chunks(num_rows, len(weight_VD), chunk):
        rows = span if kept_M is None else kept_M[span]
        x_CD, targets_C = wide(hidden_ND[rows]), targets_N[rows]
        softmax = math.softmax(head.logits(x_CD), targets_C, temperature, True)
        logprobs_N[rows], entropy_N[rows] = softmax.logprobs_C, softmax.entropy_C
        if not (need_hidden or need_weight):
            continue
        _, slope_C, _ = math.policy(
            softmax.logprobs_C,
            sampled_logprobs_N[rows],
            advantages_N[rows],
            None if proximal_logprobs_N is None else proximal_logprobs_N[rows],
            None,
            None,
            denominator[rows] if denominator.dim() else denominator,
            *clip,
        )
        factor_C1 = (-slope_C / (temperature * softmax.total_C))[:, None]
        e_CV = softmax.exp_CV.scatter_add_(1, targets_C[:, None], -softmax.total_C[:, None])
        in_place = kept_M is None and hidden_ND.dtype == e_CV.dtype
        out_CD = grad_hidden_ND[rows] if grad_hidden_ND is not None and in_place else None
        dx_CD = _products(e_CV, factor_C1, x_CD, head.weight_VD, out_CD, grad_weight_VD, need_hidden)
        if grad_hidden_ND is not None and dx_CD is not None and not in_place:
            grad_hidden_ND[rows] = dx_CD.to(grad_hidden_ND.dtype)
    loss, _, stats = math.policy(
        logprobs_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N, entropy_N, mask_N, denominator, *clip
    )
    return loss, grad_hidden_ND, grad_weight_VD, logprobs_N, entropy_N, stats
