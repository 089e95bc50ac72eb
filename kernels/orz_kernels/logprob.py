# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Log-probabilities and entropy from materialised logits: one read forward, one read and one write (in place) backward.

    p = softmax(z / tau),  logprob = log p_y,  entropy = -sum p log p
    dz_v = (g * (1[v = y] - p_v) - h * p_v * (log p_v + entropy)) / tau     for incoming gradients g and h

Each lane keeps its own running maximum over the 8 columns it reads at once: one exponential an element, not two, which
is what the special-function units can deliver at memory speed. Rows are the first grid axis and row offsets are 64-bit:
65,536 rows and more than 2**31 logits are ordinary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orz_kernels.launching import LN2, LOG2E, TL_DTYPES, cdiv, launch, optional, pick, rounded
from orz_kernels.registry import register

LANES = pick(1024, 4096)
COLUMNS = 8  # 16 bytes of bfloat16: one load
BLOCK = pick(4096, 65536)

LOWEST = tl.constexpr(-1.0e30)  # stands for -inf: finite, so that 0 * LOWEST is 0 and LOWEST - LOWEST too
_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _forward_kernel(
    logits, targets, logprobs, entropy, logsumexp, vocab, stride, scale2, LANES: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, LANES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    mass = tl.zeros((LANES,), tl.float32)
    mean = tl.zeros((LANES,), tl.float32)  # sum of e * d, d = log2 of e
    for start in range(0, vocab, LANES * COLUMNS):
        z = tl.load(logits + start + columns, mask=start + columns < vocab, other=-float("inf")).to(tl.float32)
        z = tl.maximum(z, LOWEST)
        new_top = tl.maximum(top, tl.max(z, 1))
        d = z * scale2 - (new_top * scale2)[:, None]
        e = tl.exp2(d)
        drop = (top - new_top) * scale2
        keep = tl.exp2(drop)
        mean = keep * (mean + mass * drop) + tl.sum(e * d, 1)
        mass = keep * mass + tl.sum(e, 1)
        top = new_top
    highest = tl.max(top, 0)
    drop = (top - highest) * scale2
    keep = tl.exp2(drop)
    total = tl.sum(keep * mass, 0)
    average = tl.sum(keep * (mean + mass * drop), 0) / total
    target = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    tl.store(logprobs + row, ((target - highest) * scale2 - tl.log2(total)) * _LN2)
    tl.store(entropy + row, (tl.log2(total) - average) * _LN2)
    tl.store(logsumexp + row, (highest * scale2 + tl.log2(total)) * _LN2)


@triton.jit
def _backward_kernel(
    logits, targets, logsumexp, entropy, grad_logprobs, grad_entropy, grad_logits, vocab, stride, scale2, inverse_tau,
    BLOCK: tl.constexpr, HAS_ENTROPY: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    z = tl.load(logits + row * stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
    d = tl.maximum(z, LOWEST) * scale2 - tl.load(logsumexp + row) * _LOG2E
    p = tl.exp2(d)
    g = tl.load(grad_logprobs + row).to(tl.float32) * inverse_tau
    slope = -g
    if HAS_ENTROPY:
        h = tl.load(grad_entropy + row).to(tl.float32) * inverse_tau
        slope = -g - h * (d * _LN2 + tl.load(entropy + row))
    dz = p * slope + tl.where(columns == tl.load(targets + row), g, 0.0)
    tl.store(grad_logits + row * stride + columns, rounded(dz, DTYPE), mask=inside)


@register
def logprob_forward(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, entropy and logsumexp, float32."""
    num_rows, vocab = logits_NV.shape
    out = [torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device) for _ in range(3)]
    launch(
        _forward_kernel, (num_rows,), logits_NV, targets_N, *out, vocab, logits_NV.stride(0), LOG2E / temperature,
        LANES=LANES, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    return out[0], out[1], out[2]


@logprob_forward.register_fake
def _(logits_NV, *_rest):
    return tuple(logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(3))


def _backward(
    logits_NV: Tensor, targets_N: Tensor, logsumexp_N: Tensor, entropy_N: Tensor, grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None, temperature: float, grad_NV: Tensor,
) -> None:  # fmt: skip
    num_rows, vocab = logits_NV.shape
    launch(
        _backward_kernel, (num_rows, cdiv(vocab, BLOCK)), logits_NV, targets_N, logsumexp_N, entropy_N,
        grad_logprobs_N, optional(grad_entropy_N, grad_logprobs_N), grad_NV, vocab, logits_NV.stride(0),
        LOG2E / temperature, 1 / temperature,
        BLOCK=BLOCK, HAS_ENTROPY=grad_entropy_N is not None, DTYPE=TL_DTYPES[grad_NV.dtype], num_warps=8,
    )  # fmt: skip


@register
def logprob_backward_apart(
    logits_NV: Tensor, targets_N: Tensor, logsumexp_N: Tensor, entropy_N: Tensor, grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None, temperature: float,
) -> Tensor:  # fmt: skip
    grad_NV = torch.empty_like(logits_NV)
    _backward(logits_NV, targets_N, logsumexp_N, entropy_N, grad_logprobs_N, grad_entropy_N, temperature, grad_NV)
    return grad_NV


@logprob_backward_apart.register_fake
def _(logits_NV, *_rest):
    return torch.empty_like(logits_NV)


@torch.library.custom_op("orz_kernels::logprob_backward_in_place", mutates_args=("logits_NV",))
def logprob_backward_in_place(
    logits_NV: Tensor, targets_N: Tensor, logsumexp_N: Tensor, entropy_N: Tensor, grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None, temperature: float,
) -> None:  # fmt: skip
    # A program writes only what it alone has read.
    _backward(logits_NV, targets_N, logsumexp_N, entropy_N, grad_logprobs_N, grad_entropy_N, temperature, logits_NV)


def logprob_backward(
    logits_NV: Tensor, targets_N: Tensor, logsumexp_N: Tensor, entropy_N: Tensor, grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None, temperature: float, in_place: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, in their own dtype and, if `in_place`, in their own storage."""
    if not in_place:
        apart: Tensor = logprob_backward_apart(
            logits_NV, targets_N, logsumexp_N, entropy_N, grad_logprobs_N, grad_entropy_N, temperature
        )
        return apart
    logprob_backward_in_place(
        logits_NV, targets_N, logsumexp_N, entropy_N, grad_logprobs_N, grad_entropy_N, temperature
    )
    return logits_NV
