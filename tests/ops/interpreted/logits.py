"""logprob forward and backward: Triton, interpreted, against float64."""

from __future__ import annotations

import interpreter  # isort: skip

import ops_oracle
import pytest
import torch

from orz_kernels.logprob import logprob_backward, logprob_forward

assert interpreter.ROOT.exists()


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty holds NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def both(logits, targets, temperature=1.0, spread=True, in_place=False):
    """(log-probs, entropy, gradient) found and expected, for random incoming gradients."""
    g, h = torch.randn(len(logits)), torch.randn(len(logits)) if spread else None
    want = ops_oracle.logprob(logits, targets, temperature)
    log_p = torch.log_softmax(logits.double() / temperature, 1)
    p = log_p.exp()
    grad = -g.double()[:, None] * p
    grad[torch.arange(len(g)), targets] += g.double()
    if h is not None:
        grad -= h.double()[:, None] * p * (log_p.clamp(min=-1e9) + want[1][:, None])
    grad /= temperature
    logprobs, entropy, logsumexp = logprob_forward(logits, targets, temperature)
    found = logprob_backward(logits, targets, logsumexp, entropy, g, h, temperature, in_place)
    assert found.dtype == logits.dtype
    assert (found.data_ptr() == logits.data_ptr()) == in_place
    return (logprobs, entropy, found), (*want, grad)


def check(found, expected, gradient_cap):
    assert float((found[0].double() - expected[0]).abs().max()) <= 2e-5
    assert float((found[1].double() - expected[1]).abs().max()) <= 1e-4
    # One class has no gradient, and an error relative to 0 says nothing.
    error = float((found[2].double() - expected[2]).norm())
    assert error <= gradient_cap * max(float(expected[2].norm()), 0.1)


# 1: one class. 1000: no multiple of a block. 32000: Llama 2. 128256: Llama 3. 151936, 152064: Qwen2, small and large.
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(1, torch.float32), (1000, torch.bfloat16), (1000, torch.float16), (32000, torch.float32)]
    + [(128256, torch.bfloat16), (151936, torch.bfloat16), (152064, torch.float32)],
)  # fmt: skip
def test_vocabularies(vocabulary, dtype):
    logits = (3 * torch.randn(2, vocabulary)).to(dtype)
    targets = torch.tensor([0, vocabulary - 1])
    check(*both(logits, targets, temperature=0.7), 4e-3 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("kind", ["all negative", "sixty", "unlikely", "forbidden"])
def test_hard_rows(kind):
    """Ragged vocabulary throughout: a column past its end that counted would be the largest of the all-negative row."""
    logits, targets = torch.randn(4, 1001), torch.tensor([0, 5, 999, 1000])
    if kind == "all negative":
        logits -= 50
    elif kind == "sixty":
        logits *= 20
        logits.clamp_(-60, 60)
    elif kind == "unlikely":
        logits[torch.arange(4), targets] = -100
    else:
        logits[:, 10:900] = -torch.inf
        logits[1, :5] = -torch.inf
    found, expected = both(logits, targets)
    check(found, expected, 1e-5)
    if kind == "unlikely":
        assert float(expected[0].max()) < -90


def test_impossible_target():
    logits = torch.randn(2, 100)
    logits[0, 3] = -torch.inf
    logprobs, entropy, _ = logprob_forward(logits, torch.tensor([3, 3]), 1.0)
    assert logprobs[0] == -torch.inf
    assert torch.isfinite(entropy).all() and torch.isfinite(logprobs[1])


@pytest.mark.parametrize("spread", [False, True])
def test_in_place(spread):
    logits, targets = torch.randn(3, 70_000).bfloat16(), torch.tensor([1, 69_999, 65_535])
    found, expected = both(logits, targets, spread=spread, in_place=True)
    check(found, expected, 4e-3)


def test_offsets_beyond_32_bits():
    """Rows 1.2e9 elements apart: the third begins past 2^31. Only the pages that are touched exist."""
    torch.use_deterministic_algorithms(False)
    stride, vocabulary = 1_200_000_000, 300
    storage = torch.empty(2 * stride + vocabulary, dtype=torch.bfloat16)
    logits = storage.as_strided((3, vocabulary), (stride, 1))
    logits.copy_(torch.randn(3, vocabulary))
    targets = torch.tensor([0, 150, 299])
    found, expected = both(logits, targets, in_place=True)
    check(found, expected, 4e-3)


def test_bitwise_repeatable():
    logits, targets, g = torch.randn(2, 5_000), torch.tensor([1, 2]), torch.randn(2)

    def once():
        forward = logprob_forward(logits, targets, 1.0)
        return *forward, logprob_backward(logits, targets, forward[2], forward[1], g, g, 1.0, False)

    first = once()
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(first, once(), strict=True))
