"""The public ops of orz_async served by the Triton kernels: autograd, typed statistics, and the same answers."""

from __future__ import annotations

import interpreter  # isort: skip

import pytest
import torch

from orz_async import ops
from orz_async.ops import backend

assert interpreter.ROOT.exists()


def everything(name):
    """All ops once, with gradients, by the backend `name`."""
    torch.manual_seed(0)
    n, vocabulary, width = 24, 90, 16
    hidden = torch.randn(n, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets, mask = torch.randint(vocabulary, (n,)), torch.rand(n) < 0.7
    sampled, values = -4 - torch.rand(n), torch.randn(n)
    starts = torch.tensor([0, 10, 24], dtype=torch.int32)
    with backend.using(name):
        advantages, returns = ops.gae(torch.randn(n), values, starts, gamma=0.99, lam=0.95, mask_N=mask)
        advantages = ops.whiten(advantages, mask)
        out = ops.ppo_head(hidden, weight, targets, sampled, advantages, mask_N=mask, denominator=9.0)
        logprobs, entropy = ops.head_logprob(hidden, weight, targets)
        again, _ = ops.logprob(hidden @ weight.T, targets, backward_in_place=True)
        loss, stats = ops.ppo_loss(logprobs, sampled, advantages, mask_N=mask, denominator=torch.tensor(9.0))
        value, value_stats = ops.value_loss(hidden[:, 0].contiguous(), values, returns, mask_N=mask, denominator=9.0)
        total = out.loss + loss + value + (0.01 * entropy + 0.1 * again).sum()
        grads = torch.autograd.grad(total, (hidden, weight))
    totals = type(stats).finalise([stats, out.stats]), type(value_stats).finalise([value_stats])
    return (advantages, returns, out.logprobs_N, logprobs, again, entropy, total.detach(), *grads), totals


def test_the_same_as_the_reference():
    found, totals = everything("triton")
    expected, want = everything("reference")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    for x, y in zip(totals, want, strict=True):
        assert x == pytest.approx(y, rel=2e-5, abs=2e-6)


def test_float64_is_the_reference_s():
    with backend.using("triton"):
        x = torch.randn(5, dtype=torch.float64)
        assert ops.whiten(x).dtype == torch.float64


def test_torch_compile_keeps_an_op_whole():
    """Registered ops have shape rules: a graph with one in it is whole."""
    from orz_kernels.whiten import moments, whiten

    def function(x):
        return whiten(x, None, moments(x, None), 1e-8) * 2

    graph = torch.compile(function, backend="eager", fullgraph=True)
    x = torch.randn(50)
    assert torch.equal(graph(x), function(x))
