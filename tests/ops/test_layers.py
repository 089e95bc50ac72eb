"""RMSNorm and the gate of SwiGLU, forward and backward, against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orz_async import ops
from orz_async.ops import backend

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def drawn(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(shape, generator=draw) * scale).requires_grad_() for shape in shapes]


def compared(found: Callable[..., Tensor], exact: Callable[..., Tensor], x: list[Tensor], tolerance: float) -> None:
    wide = [each.detach().double().requires_grad_() for each in x]
    made, want = found(*x), exact(*wide)
    torch.testing.assert_close(made.double(), want, rtol=tolerance, atol=tolerance)
    slope = torch.randn(made.shape, generator=torch.Generator().manual_seed(4))
    got = torch.autograd.grad((made * slope).sum(), x)
    for one, other in zip(got, torch.autograd.grad((want * slope).sum(), wide), strict=True):
        size = float(other.abs().max().clamp(min=1.0))
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * size)


@pytest.mark.usefixtures("ops_backend")
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 7), (300, 128), (513, 96), (2, 4096)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_equals_float64(rows: int, dim: int, scale: float) -> None:
    [x] = drawn((rows, dim), scale=scale)
    [weight] = drawn((dim,))
    if scale == 1e-4:  # slopes of 1 / rms: 10,000 and more
        made = ops.rms_norm(x, weight, EPS)
        torch.testing.assert_close(made.double(), rms_norm(x.double(), weight.double()), rtol=2e-6, atol=2e-6)
        return
    compared(lambda *given: ops.rms_norm(*given, EPS), rms_norm, [x, weight], 3e-6)


@pytest.mark.usefixtures("ops_backend")
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (300, 256)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_silu_mul_equals_float64(shape: tuple[int, int], scale: float) -> None:
    compared(ops.silu_mul, silu_mul, drawn(shape, shape, scale=scale), 2e-6)


@pytest.mark.usefixtures("ops_backend")
def test_far_ends_of_the_gate() -> None:
    gate = torch.tensor([[-200.0, -90.0, -87.5, 0.0, 87.5, 200.0, float("nan")]]).requires_grad_()
    up = torch.ones_like(gate)
    made = ops.silu_mul(gate, up)
    torch.testing.assert_close(made[0, :-1], torch.tensor([0.0, 0.0, 0.0, 0.0, 87.5, 200.0]), atol=1e-30, rtol=1e-6)
    assert made[0, -1].isnan()
    [slope] = torch.autograd.grad(made.sum(), [gate])
    torch.testing.assert_close(slope[0, :-1], torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-30, rtol=1e-6)


def test_bits_depend_on_no_number_of_threads_and_a_row_on_no_other() -> None:
    x, gate, up = drawn((1500, 33), (1500, 33), (1500, 33))
    [weight] = drawn((33,))
    made: list[list[Tensor]] = []
    with backend.using("cpu"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            norm, gated = ops.rms_norm(x, weight, EPS), ops.silu_mul(gate, up)
            gradients = torch.autograd.grad((norm * gated).sum(), [x, weight, gate, up])
            made.append([norm, gated, *gradients])
        alone = ops.rms_norm(x[700:701], weight, EPS)
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(alone, made[0][0][700:701])


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match="x_ND: expected float32, found float64"):
        ops.rms_norm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match=r"weight_D: expected shape \[4\], found shape \[3\]"):
        ops.rms_norm(x, weight[:3], EPS)
    with pytest.raises(ValueError, match="up_NF: expected shape"):
        ops.silu_mul(x, x[:2])
