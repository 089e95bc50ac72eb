"""logprob, head_logprob and ppo_head against float64: the test matrix of kernels.md on host memory.

Caps: |d logp| <= 2e-5, entropy <= 1e-4, gradients <= 4e-3 relative, and far below that in float32.
"""

from __future__ import annotations

import ops_oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orz_async import ops
from orz_async.ops import PpoStats

pytestmark = pytest.mark.usefixtures("ops_backend")

# 1000: not a multiple of any block. 32000: Llama 2. 128256: Llama 3. 151936 and 152064: Qwen2 small and large.
VOCABULARIES = [1, 7, 8, 9, 1000, 32000, 128256, 151936, 152064]
OPTIONS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3},
    {"dual_clip": 3.0},
    {"proximal": True},
    {"proximal": True, "behaviour_cap": 1.5},
    {"proximal": True, "behaviour_cap": 1.1, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 2.0},
]


def problem(
    num_tokens: int, vocabulary: int, width: int, *, scale: float = 1.0, shift: float = 0.0
) -> dict[str, Tensor]:
    hidden = torch.randn(num_tokens, width) * scale
    weight = torch.randn(vocabulary, width) / width**0.5
    if shift:  # a direction all rows of the head share, and hidden states that point along it
        weight += shift * torch.ones(width) / width**0.5
        hidden += torch.ones(width)
    targets = torch.randint(vocabulary, (num_tokens,))
    logprobs, _ = ops_oracle.logprob(hidden.double() @ weight.double().T, targets)
    return {
        "hidden_ND": hidden,
        "weight_VD": weight,
        "targets_N": targets,
        "sampled_logprobs_N": (logprobs + 0.3 * torch.randn(num_tokens)).float(),
        "proximal_logprobs_N": (logprobs + 0.1 * torch.randn(num_tokens)).float(),
        "advantages_N": torch.randn(num_tokens),
    }


def oracle_ppo_head(p: dict[str, Tensor], temperature: float, mask: Tensor | None, denominator, options):
    """(loss, dX, dW, logprobs, entropy) by autograd of the textbook formula."""
    hidden = p["hidden_ND"].detach().double().requires_grad_()
    weight = p["weight_VD"].detach().double().requires_grad_()
    keep = torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask
    logprobs, entropy = ops_oracle.logprob(hidden[keep] @ weight.T, p["targets_N"][keep], temperature)
    kwargs = {k: v for k, v in options.items() if k != "proximal"}
    if options.get("proximal"):
        kwargs["proximal"] = p["proximal_logprobs_N"][keep]
    terms = ops_oracle.policy_loss_terms(logprobs, p["sampled_logprobs_N"][keep], p["advantages_N"][keep], **kwargs)
    divisor = denominator[keep].double() if isinstance(denominator, Tensor) and denominator.dim() else denominator
    loss = (terms / divisor).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, logprobs.detach(), entropy.detach()


def run_ppo_head(p: dict[str, Tensor], temperature=1.0, mask=None, denominator=7.0, options=None, chunk=None):
    hidden, weight = p["hidden_ND"].detach().requires_grad_(), p["weight_VD"].detach().requires_grad_()
    kwargs = {k: v for k, v in (options or {}).items() if k != "proximal"}
    if (options or {}).get("proximal"):
        kwargs["proximal_logprobs_N"] = p["proximal_logprobs_N"]
    out = ops.ppo_head(
        hidden,
        weight,
        p["targets_N"],
        p["sampled_logprobs_N"],
        p["advantages_N"],
        temperature=temperature,
        mask_N=mask,
        denominator=denominator,
        chunk=chunk,
        **kwargs,
    )
    out.loss.backward()
    return out, hidden.grad, weight.grad


def check_ppo_head(p, temperature=1.0, mask=None, denominator=7.0, options=None, chunk=None) -> None:
    out, grad_hidden, grad_weight = run_ppo_head(p, temperature, mask, denominator, options, chunk)
    loss, want_hidden, want_weight, logprobs, entropy = oracle_ppo_head(
        p, temperature, mask, denominator, options or {}
    )
    keep = slice(None) if mask is None else mask
    assert float((out.logprobs_N[keep].double() - logprobs).abs().max()) <= 2e-5
    assert float((out.entropy_N[keep].double() - entropy).abs().max()) <= 1e-4
    torch.testing.assert_close(out.loss.double(), loss, atol=2e-6, rtol=2e-5)
    assert ops_oracle.relative(grad_hidden, want_hidden) <= 2e-5
    assert ops_oracle.relative(grad_weight, want_weight) <= 2e-5


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ppo_head_over_vocabularies(vocabulary: int) -> None:
    check_ppo_head(problem(5, vocabulary, 8))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ppo_head_over_objectives(options: dict[str, float], temperature: float) -> None:
    p = problem(300, 50, 16)
    check_ppo_head(p, temperature=temperature, options=options)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(1, 70),
    vocabulary=st.integers(1, 70),
    width=st.integers(1, 20),
    chunk=st.one_of(st.none(), st.integers(1, 80)),
    kept=st.floats(0.1, 1.0),
    per_token=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_ppo_head_over_ragged_batches(num_tokens, vocabulary, width, chunk, kept, per_token, seed) -> None:
    torch.manual_seed(seed)
    p = problem(num_tokens, vocabulary, width)
    mask = torch.rand(num_tokens) < kept
    mask[0] = True
    denominator = 1 + 5 * torch.rand(num_tokens) if per_token else 3.0
    check_ppo_head(p, mask=mask, denominator=denominator, chunk=chunk)


def test_ppo_head_with_a_direction_shared_by_all_rows() -> None:
    check_ppo_head(problem(64, 2000, 32, shift=4.0))


def test_ppo_head_with_large_and_all_negative_logits() -> None:
    p = problem(64, 500, 16, scale=20.0)  # |z| to about 60
    out, _, _ = run_ppo_head(p)
    _, _, _, logprobs, entropy = oracle_ppo_head(p, 1.0, None, 7.0, {})
    assert float((out.logprobs_N.double() - logprobs).abs().max()) <= 2e-5
    assert float((out.entropy_N.double() - entropy).abs().max()) <= 1e-4
    # Columns past V or a maximum that starts at 0 would show here.
    p = problem(33, 1000, 16)
    p["hidden_ND"] = p["hidden_ND"].abs() + 1
    p["weight_VD"] = -p["weight_VD"].abs() - 0.5
    check_ppo_head(p)


def test_ppo_head_with_a_log_prob_of_minus_a_hundred() -> None:
    p = problem(8, 30, 4)
    p["hidden_ND"] = torch.zeros(8, 4)
    p["hidden_ND"][:, 0] = 100.0
    p["weight_VD"] = torch.zeros(30, 4)
    p["weight_VD"][3, 0] = 1.0
    p["targets_N"] = torch.full((8,), 5)
    p["sampled_logprobs_N"] = torch.full((8,), -100.2)
    out, grad_hidden, grad_weight = run_ppo_head(p)
    _, want_hidden, want_weight, logprobs, _ = oracle_ppo_head(p, 1.0, None, 7.0, {})
    torch.testing.assert_close(out.logprobs_N.double(), logprobs, rtol=1e-6, atol=1e-5)
    assert ops_oracle.relative(grad_hidden, want_hidden) <= 1e-4
    assert ops_oracle.relative(grad_weight, want_weight) <= 1e-4


def test_ppo_head_does_not_depend_on_the_chunk_and_repeats_bitwise() -> None:
    p = problem(257, 300, 24)
    first, *grads = run_ppo_head(p, chunk=64)
    for _ in range(20):
        again, *grads_again = run_ppo_head(p, chunk=64)
        assert torch.equal(first.loss, again.loss) and torch.equal(first.logprobs_N, again.logprobs_N)
        assert all(torch.equal(x, y) for x, y in zip(grads, grads_again, strict=True))
        assert torch.equal(first.stats.vector(), again.stats.vector())
    for chunk in (1, 63, 65, 256, 257, 1000, None):
        other, *grads_other = run_ppo_head(p, chunk=chunk)
        assert float((other.logprobs_N - first.logprobs_N).abs().max()) <= 2e-5
        for x, y in zip(grads, grads_other, strict=True):
            assert ops_oracle.relative(y, x) <= 1e-5


def test_ppo_head_ignores_what_masked_rows_hold() -> None:
    p = problem(40, 30, 8)
    mask = torch.rand(40) < 0.5
    first, *grads = run_ppo_head(p, mask=mask)
    for name in ("hidden_ND", "sampled_logprobs_N", "advantages_N"):
        p[name] = p[name].clone()
        p[name][~mask] = torch.nan
    p["targets_N"] = torch.where(mask, p["targets_N"], -100)
    second, *grads_second = run_ppo_head(p, mask=mask)
    assert torch.equal(first.loss, second.loss) and torch.equal(first.logprobs_N, second.logprobs_N)
    assert not first.logprobs_N[~mask].any() and not first.entropy_N[~mask].any()
    assert all(torch.equal(x, y) for x, y in zip(grads, grads_second, strict=True))
    assert not grads[0][~mask].any()


def test_ppo_head_without_any_token() -> None:
    p = problem(5, 30, 8)
    out, grad_hidden, grad_weight = run_ppo_head(p, mask=torch.zeros(5, dtype=torch.bool))
    assert out.loss.item() == 0.0 and not grad_hidden.any() and not grad_weight.any()
    assert PpoStats.finalise([out.stats])["tokens"] == 0.0
    p = problem(0, 30, 8)
    out, grad_hidden, grad_weight = run_ppo_head(p)
    assert out.loss.item() == 0.0 and grad_hidden.shape == (0, 8) and not grad_weight.any()


def test_ppo_head_equals_the_ops_it_fuses() -> None:
    p = problem(200, 60, 16)
    fused, *grads = run_ppo_head(p, options={"proximal": True, "behaviour_cap": 1.2})
    hidden, weight = p["hidden_ND"].detach().requires_grad_(), p["weight_VD"].detach().requires_grad_()
    logprobs, entropy = ops.head_logprob(hidden, weight, p["targets_N"], chunk=64)
    loss, stats = ops.ppo_loss(
        logprobs,
        p["sampled_logprobs_N"],
        p["advantages_N"],
        proximal_logprobs_N=p["proximal_logprobs_N"],
        entropy_N=entropy.detach(),
        behaviour_cap=1.2,
        denominator=7.0,
    )
    loss.backward()
    torch.testing.assert_close(fused.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.stats.vector(), stats.vector(), rtol=1e-5, atol=1e-5)
    assert ops_oracle.relative(grads[0], hidden.grad) <= 1e-5
    assert ops_oracle.relative(grads[1], weight.grad) <= 1e-5


def test_the_loss_scales_its_gradients_and_gives_them_once() -> None:
    p = problem(20, 30, 8)
    _, grad_hidden, grad_weight = run_ppo_head(p)
    hidden, weight = p["hidden_ND"].detach().requires_grad_(), p["weight_VD"].detach().requires_grad_()
    args = (p["targets_N"], p["sampled_logprobs_N"], p["advantages_N"])
    loss = ops.ppo_head(hidden, weight, *args, denominator=7.0).loss
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, 3 * grad_hidden)
    torch.testing.assert_close(weight.grad, 3 * grad_weight)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()
    with torch.no_grad():
        assert not ops.ppo_head(hidden, weight, *args, denominator=7.0).loss.requires_grad
    only_hidden = ops.ppo_head(hidden, weight.detach(), *args, denominator=7.0).loss
    hidden.grad = None
    only_hidden.backward()
    torch.testing.assert_close(hidden.grad, grad_hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ppo_head_in_other_dtypes(dtype: torch.dtype) -> None:
    p = problem(50, 400, 16)
    p = {k: v.to(dtype) if k in ("hidden_ND", "weight_VD") else v for k, v in p.items()}
    out, grad_hidden, grad_weight = run_ppo_head(p)
    _, want_hidden, want_weight, logprobs, _ = oracle_ppo_head(p, 1.0, None, 7.0, {})
    assert grad_hidden.dtype == grad_weight.dtype == dtype
    assert float((out.logprobs_N.double() - logprobs).abs().max()) <= (1e-12 if dtype == torch.float64 else 2e-5)
    # What is left is the rounding of the gradient itself to its dtype.
    cap = {torch.float64: 1e-10, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert ops_oracle.relative(grad_hidden, want_hidden) <= cap
    assert ops_oracle.relative(grad_weight, want_weight) <= cap


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("in_place", [False, True])
def test_logprob_and_its_gradient(vocabulary: int, in_place: bool) -> None:
    logits = 3 * torch.randn(6, vocabulary)
    # So far below 0 that a maximum which began there would lose every term.
    logits[0] = -torch.rand(vocabulary) * 30 - 70
    if vocabulary > 2:
        logits[1, 1:] = -torch.inf
        logits[1, 0] = 2.0
        logits[2, ::2] = -torch.inf
    targets = torch.randint(vocabulary, (6,))
    targets[1] = 0
    targets[2] = min(1, vocabulary - 1)
    weights = torch.randn(2, 6)
    base = logits.clone().requires_grad_()
    logprobs, entropy = ops.logprob(base * 1.0, targets, temperature=0.7, backward_in_place=in_place)
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    exact = logits.double().requires_grad_()
    want_logprobs, want_entropy = ops_oracle.logprob(exact, targets, 0.7)
    finite = torch.isfinite(logits)
    # By hand: autograd of the oracle meets 0 * -inf. d logp = onehot - p, d entropy = -p (log p + entropy).
    log_p = torch.log_softmax(logits.double() / 0.7, 1)
    p = log_p.exp()
    onehot = torch.nn.functional.one_hot(targets, vocabulary).double()
    spread = torch.where(finite, p * (log_p + want_entropy.detach()[:, None]), 0.0)
    want = (weights[0, :, None] * (onehot - p) - weights[1, :, None] * spread) / 0.7
    torch.testing.assert_close(logprobs.double(), want_logprobs.detach(), atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), want_entropy.detach(), atol=2e-5, rtol=1e-6)
    # A logsumexp near -140 has 1.5e-5 of rounding, and p carries it.
    torch.testing.assert_close(base.grad.double(), want, atol=2e-6, rtol=1e-4)


def test_threads_change_no_bit() -> None:
    logits, targets = torch.randn(9, 32000), torch.randint(32000, (9,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        base = logits.clone().requires_grad_()
        logprobs, entropy = ops.logprob(base, targets)
        (logprobs + entropy).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), base.grad))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_logprob_in_place_really_overwrites() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    scores = logits * 1.0
    logprobs, _ = ops.logprob(scores, torch.zeros(4, dtype=torch.int64), backward_in_place=True)
    logprobs.sum().backward()
    assert torch.equal(scores.detach(), logits.grad)
    scores = logits * 1.0
    logprobs, _ = ops.logprob(scores, torch.zeros(4, dtype=torch.int64))
    before = scores.detach().clone()
    logprobs.sum().backward()
    assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logprob_of_half_precision_logits(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(7, 1001)).to(dtype)
    targets = torch.randint(1001, (7,), dtype=torch.int32)
    base = logits.clone().requires_grad_()
    logprobs, entropy = ops.logprob(base, targets)
    want_logprobs, want_entropy = ops_oracle.logprob(logits, targets)
    torch.testing.assert_close(logprobs.double(), want_logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=1e-4, rtol=0)
    logprobs.sum().backward()
    onehot = torch.nn.functional.one_hot(targets.long(), 1001)
    want = onehot - torch.softmax(logits.double(), 1)
    assert base.grad.dtype == dtype
    assert ops_oracle.relative(base.grad, want) <= 4e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_head_logprob_and_its_gradient(temperature: float, chunk: int | None) -> None:
    p = problem(65, 120, 12)
    hidden, weight = p["hidden_ND"].detach().requires_grad_(), p["weight_VD"].detach().requires_grad_()
    logprobs, entropy = ops.head_logprob(hidden, weight, p["targets_N"], temperature=temperature, chunk=chunk)
    mix = torch.randn(2, 65)
    (logprobs * mix[0] + entropy * mix[1]).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_logprobs, want_entropy = ops_oracle.logprob(exact[0] @ exact[1].T, p["targets_N"], temperature)
    (want_logprobs * mix[0] + want_entropy * mix[1]).sum().backward()
    torch.testing.assert_close(logprobs.double(), want_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=1e-5, rtol=0)
    assert ops_oracle.relative(hidden.grad, exact[0].grad) <= 1e-5
    assert ops_oracle.relative(weight.grad, exact[1].grad) <= 1e-5


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_head_logprob_over_vocabularies(vocabulary: int) -> None:
    p = problem(5, vocabulary, 8)
    hidden, weight = p["hidden_ND"].detach().requires_grad_(), p["weight_VD"].detach().requires_grad_()
    logprobs, entropy = ops.head_logprob(hidden, weight, p["targets_N"], chunk=3)
    mix = torch.randn(2, 5)
    (logprobs * mix[0] + entropy * mix[1]).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_logprobs, want_entropy = ops_oracle.logprob(exact[0] @ exact[1].T, p["targets_N"])
    (want_logprobs * mix[0] + want_entropy * mix[1]).sum().backward()
    assert float((logprobs.double() - want_logprobs).detach().abs().max()) <= 2e-5
    assert float((entropy.double() - want_entropy).detach().abs().max()) <= 1e-4
    for found, want in zip((hidden.grad, weight.grad), (exact[0].grad, exact[1].grad), strict=True):
        # One class has no gradient, and an error relative to 0 says nothing.
        assert float((found.double() - want).norm()) <= 2e-5 * max(float(want.norm()), 0.1)


@pytest.mark.parametrize("kind", ["shared direction", "all negative", "sixty", "minus a hundred"])
def test_head_logprob_in_hard_cases(kind: str) -> None:
    """What ppo_head is tried with, for the op that a proximal policy is computed with."""
    scale = {"sixty": 20.0, "minus a hundred": 0.1}.get(kind, 1.0)
    p = problem(40, 1000, 16, scale=scale, shift=4.0 if kind == "shared direction" else 0.0)
    if kind == "all negative":  # columns past V, or a maximum that starts at 0, would show
        p["hidden_ND"], p["weight_VD"] = p["hidden_ND"].abs() + 1, -p["weight_VD"].abs() - 0.5
    if kind == "minus a hundred":
        p["hidden_ND"][:, 0], p["weight_VD"][:, 0], p["weight_VD"][3, 0] = 10.0, 0.0, 10.0
        p["targets_N"][:] = 5
    hidden, weight = p["hidden_ND"].detach().requires_grad_(), p["weight_VD"].detach().requires_grad_()
    logprobs, entropy = ops.head_logprob(hidden, weight, p["targets_N"], chunk=16)
    logprobs.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want_logprobs, want_entropy = ops_oracle.logprob(exact[0] @ exact[1].T, p["targets_N"])
    want_logprobs.sum().backward()
    assert float(want_logprobs.detach().max()) < -80 or kind != "minus a hundred"
    assert float((logprobs.double() - want_logprobs).detach().abs().max()) <= 2e-5
    assert float((entropy.double() - want_entropy).detach().abs().max()) <= 1e-4
    assert ops_oracle.relative(hidden.grad, exact[0].grad) <= 1e-4
    assert ops_oracle.relative(weight.grad, exact[1].grad) <= 1e-4


def test_log_probs_repeat_bitwise() -> None:
    p = problem(33, 500, 16)

    def once() -> list[Tensor]:
        hidden, weight = p["hidden_ND"].detach().requires_grad_(), p["weight_VD"].detach().requires_grad_()
        straight = ops.head_logprob(hidden, weight, p["targets_N"], chunk=10)
        logits = ops.logprob(hidden @ weight.T, p["targets_N"])
        (sum(straight) + sum(logits)).sum().backward()
        return [*(x.detach() for x in (*straight, *logits)), hidden.grad, weight.grad]

    first = once()
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(first, once(), strict=True))


def test_only_the_entropy_is_differentiated() -> None:
    hidden, weight = torch.randn(9, 5, requires_grad=True), torch.randn(11, 5)
    _, entropy = ops.head_logprob(hidden, weight, torch.zeros(9, dtype=torch.int64))
    entropy.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    ops_oracle.logprob(exact @ weight.double().T, torch.zeros(9, dtype=torch.int64))[1].sum().backward()
    assert ops_oracle.relative(hidden.grad, exact.grad) <= 1e-5


@pytest.mark.parametrize("row", [3, 99])  # inside a block of eight, and in what is left over
def test_a_nan_weight_is_not_hidden(row: int) -> None:
    p = problem(5, 100, 8)
    p["weight_VD"][row] = torch.nan
    p["targets_N"][:] = 1
    out, _, _ = run_ppo_head(p)
    assert torch.isnan(out.loss) and torch.isnan(out.logprobs_N).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(4)}, "hidden_ND: expected shape"),
        ({"weight_VD": torch.zeros(6, 4)}, r"weight_VD: expected shape \['any', 3\], found shape \[6, 4\]"),
        ({"weight_VD": torch.zeros(6, 3, dtype=torch.bfloat16)}, "weight_VD: expected float32, found bfloat16"),
        ({"weight_VD": torch.zeros(3, 6).T}, "weight_VD: expected a contiguous tensor"),
        ({"targets_N": torch.tensor([0, 1, 2, 6])}, r"targets_N: expected indices in \[0, 6\), found 0 to 6"),
        ({"targets_N": torch.tensor([0, 1, 2, -1])}, r"targets_N: expected indices in \[0, 6\), found -1 to 2"),
        ({"targets_N": torch.zeros(4)}, "targets_N: expected int64 or int32, found float32"),
        ({"temperature": 0.0}, "temperature: expected a positive finite number, found 0.0"),
        ({"chunk": 0}, "chunk: expected an integer of at least 1, found 0"),
        ({"denominator": 0.0}, "denominator: expected a positive finite number"),
        ({"denominator": torch.tensor([1.0, 1.0, 0.0, 1.0])}, "denominator: expected positive numbers, found 0.0"),
        ({"denominator": torch.ones(3)}, r"denominator: expected shape \[4\], found shape \[3\]"),
        ({"sampled_logprobs_N": torch.tensor([0.0, torch.nan, 0, 0])}, "sampled_logprobs_N: expected finite numbers"),
        ({"advantages_N": torch.zeros(3)}, r"advantages_N: expected shape \[4\]"),
        (
            {"sampled_logprobs_N": torch.zeros(3), "advantages_N": torch.zeros(3)},
            r"sampled_logprobs_N: expected shape \[4\], found shape \[3\]",
        ),
        ({"clip_low": -0.1}, "clip_low: expected a number"),
        ({"dual_clip": 1.0}, "dual_clip: expected a number"),
        ({"behaviour_cap": 2.0}, "behaviour_cap: expected proximal_logprobs_N beside it"),
        ({"mask_N": torch.ones(4, dtype=torch.int64)}, "mask_N: expected bool"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    good = {
        "hidden_ND": torch.zeros(4, 3),
        "weight_VD": torch.zeros(6, 3),
        "targets_N": torch.zeros(4, dtype=torch.int64),
        "sampled_logprobs_N": torch.zeros(4),
        "advantages_N": torch.zeros(4),
        "denominator": 1.0,
    }
    ops.ppo_head(**good)
    with pytest.raises(ValueError, match=message):
        ops.ppo_head(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.zeros(4)}, r"logits_NV: expected shape \['any', 'any'\], found shape \[4\]"),
        ({"logits_NV": torch.zeros(4, 6, dtype=torch.int64)}, "logits_NV: expected float32 or .*, found int64"),
        ({"logits_NV": torch.zeros(6, 4).T}, "logits_NV: expected a contiguous tensor"),
        ({"logits_NV": [[0.0] * 6] * 4}, "logits_NV: expected a torch.Tensor, found list"),
        ({"targets_N": torch.tensor([0, 1, 2, 6])}, r"targets_N: expected indices in \[0, 6\), found 0 to 6"),
        ({"targets_N": torch.zeros(3, dtype=torch.int64)}, r"targets_N: expected shape \[4\], found shape \[3\]"),
        ({"targets_N": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets_N: expected device cpu, found meta"),
        ({"temperature": float("inf")}, "temperature: expected a positive finite number, found inf"),
        (
            {"logits_NV": torch.zeros(4, 6, requires_grad=True), "backward_in_place": True},
            "backward_in_place: expected",
        ),
    ],
)
def test_bad_logits_are_named(change: dict[str, object], message: str) -> None:
    good = {"logits_NV": torch.zeros(4, 6), "targets_N": torch.zeros(4, dtype=torch.int64)}
    ops.logprob(**good)
    with pytest.raises(ValueError, match=message):
        ops.logprob(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(4, 3).double()}, "weight_VD: expected float64, found float32"),
        ({"weight_VD": torch.zeros(6, 3, device="meta")}, "weight_VD: expected device cpu, found meta"),
        ({"weight_VD": None}, "weight_VD: expected a torch.Tensor, found NoneType"),
        ({"targets_N": torch.full((4,), 9)}, r"targets_N: expected indices in \[0, 6\), found 9 to 9"),
        ({"temperature": -1.0}, "temperature: expected a positive finite number, found -1.0"),
        ({"chunk": 2.0}, "chunk: expected an integer of at least 1, found 2.0"),
    ],
)
def test_bad_heads_are_named(change: dict[str, object], message: str) -> None:
    good = {"hidden_ND": torch.zeros(4, 3), "weight_VD": torch.zeros(6, 3), "targets_N": torch.zeros(4).long()}
    ops.head_logprob(**good)
    with pytest.raises(ValueError, match=message):
        ops.head_logprob(**(good | change))
