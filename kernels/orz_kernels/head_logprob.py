# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Log-probs and entropy straight from the LM head, [N, V] never in memory: forward 2TVH, backward 6TVH operations.

z = hidden @ weight.T / tau,   dz = g * (onehot - p) - h * p * (log p + entropy),   dX = dz @ W,   dW = dz.T @ X
"""

from __future__ import annotations

import torch
from torch import Tensor

from orz_kernels.head import make_tiles, plan, product, subtract_product, usable
from orz_kernels.head_rows import add_targets, combine, finish_hidden, foretell
from orz_kernels.head_tiles import GRAD, SUM
from orz_kernels.launching import LOG2E
from orz_kernels.registry import register


@register
def head_logprob_forward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, entropy and logsumexp, float32."""
    hidden_ND, weight_VD = usable(hidden_ND, weight_VD)
    head = plan(hidden_ND, weight_VD, temperature, chunk, SUM)
    out = [torch.empty(len(hidden_ND), device=hidden_ND.device) for _ in range(3)]
    for start in range(0, len(hidden_ND), head.chunk):
        rows = slice(start, start + head.chunk)
        hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
        target2_C, reference_C = foretell(hidden_CD, weight_VD, targets_C, None, head.scale2)
        make_tiles(head, SUM, hidden_CD, targets_C, reference_C)
        unused = torch.empty_like(target2_C)
        combine(head.partials_TPC, SUM, target2_C, reference_C, (*(x[rows] for x in out), unused, unused, unused))
    return out[0], out[1], out[2]


@head_logprob_forward.register_fake
def _(hidden_ND, *_rest):
    return tuple(hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(3))


@register
def head_logprob_grads(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, logsumexp_N: Tensor, entropy_N: Tensor,
    grad_logprobs_N: Tensor, grad_entropy_N: Tensor | None, temperature: float, chunk: int | None,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = hidden_ND.dtype
    hidden_ND, weight_VD = usable(hidden_ND, weight_VD)
    head = plan(hidden_ND, weight_VD, temperature, chunk, GRAD)
    grad_hidden_ND = torch.empty(hidden_ND.shape if need_hidden else 0, dtype=dtype, device=hidden_ND.device)
    grad_weight_VD = torch.zeros(weight_VD.shape if need_weight else 0, device=hidden_ND.device)
    reference_N = logsumexp_N * LOG2E
    slope_N = grad_logprobs_N.float() / temperature
    spread_N = None if grad_entropy_N is None else grad_entropy_N.float() / temperature
    others_N, ones_N = torch.empty_like(reference_N), torch.ones_like(reference_N)
    for start in range(0, len(hidden_ND), head.chunk):
        rows = slice(start, start + head.chunk)
        hidden_CD, targets_C, reference_C = hidden_ND[rows], targets_N[rows], reference_N[rows]
        spread_C = None if spread_N is None else spread_N[rows]
        make_tiles(head, GRAD, hidden_CD, targets_C, reference_C, slope_N[rows], spread_C, entropy_N[rows])
        unused = torch.empty_like(reference_C)
        combine(head.partials_TPC, GRAD, reference_C, reference_C, (*[unused] * 5, others_N[rows]))
        out_CV, product_CD = head.out_CV[: len(hidden_CD), : head.vocab], head.product_CD[: len(hidden_CD)]
        if need_hidden:
            product(out_CV, weight_VD, product_CD)
            finish_hidden(product_CD, weight_VD, targets_C, ones_N[rows], others_N[rows], None, grad_hidden_ND[rows])
        if need_weight:
            subtract_product(grad_weight_VD, out_CV.t(), hidden_CD, first=start == 0)
    if need_weight:
        add_targets(grad_weight_VD, hidden_ND, targets_N, ones_N, others_N)
    return grad_hidden_ND, grad_weight_VD


@head_logprob_grads.register_fake
def _(hidden_ND, weight_VD, *rest):
    need_hidden, need_weight = rest[-2:]
    grad_hidden_ND = hidden_ND.new_empty(hidden_ND.shape if need_hidden else 0)
    return grad_hidden_ND, weight_VD.new_empty(weight_VD.shape if need_weight else 0, dtype=torch.float32)


def head_logprob_backward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, logsumexp_N: Tensor, entropy_N: Tensor,
    grad_logprobs_N: Tensor, grad_entropy_N: Tensor | None, temperature: float, chunk: int | None,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden (its dtype) and weight (float32), or None where not needed."""
    grad_hidden_ND, grad_weight_VD = head_logprob_grads(
        hidden_ND, weight_VD, targets_N, logsumexp_N, entropy_N, grad_logprobs_N, grad_entropy_N, temperature, chunk,
        need_hidden, need_weight,
    )  # fmt: skip
    return grad_hidden_ND if need_hidden else None, grad_weight_VD if need_weight else None
