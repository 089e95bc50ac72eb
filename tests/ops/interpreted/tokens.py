"""gae, whiten, ppo_loss and value_loss: Triton, interpreted, against float64."""

from __future__ import annotations

import interpreter  # isort: skip

import math

import ops_oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orz_kernels import gae as gae_module
from orz_kernels import ppo_loss as ppo_module
from orz_kernels import value_loss as value_module
from orz_kernels import whiten as whiten_module

assert interpreter.ROOT.exists()
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty holds NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def close(found, expected, cap=2e-5):
    scale = max(1.0, float(expected.abs().max())) if len(expected) else 1.0
    assert found.dtype == torch.float32
    assert float((found.double() - expected).abs().max() if len(expected) else 0.0) <= cap * scale


@pytest.fixture
def blocks_of_64(monkeypatch):
    monkeypatch.setattr(gae_module, "BLOCK", 64)


@FEW
@given(data=st.data())
def test_gae_on_ragged_batches(data, blocks_of_64):
    """Empty sequences, sequences over several blocks, observations anywhere, any gamma and lambda."""
    lengths = data.draw(st.lists(st.one_of(st.integers(0, 5), st.integers(60, 150)), min_size=1, max_size=6))
    gamma, lam = (data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])) for _ in range(2))
    n = sum(lengths)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rewards, values, boots = (torch.randn(k, generator=generator) for k in (n, n, len(lengths)))
    mask = torch.rand(n, generator=generator) < 0.7 if data.draw(st.booleans()) else None
    boot = boots if data.draw(st.booleans()) else None
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    expected = ops_oracle.gae(rewards, values, starts, gamma, lam, mask, boot)
    if mask is not None:
        rewards[~mask] = values[~mask] = torch.nan
    found = gae_module.gae(rewards, values, starts, gamma, lam, mask, boot)
    close(found[0], expected[0])
    close(found[1], expected[1])


# one token; below, at and above one block of 64; more blocks than one step of the carry reads
@pytest.mark.parametrize("n", [1, 63, 64, 65, 64 * 20 + 1])
def test_gae_sizes(n, monkeypatch, blocks_of_64):
    monkeypatch.setattr(gae_module, "SPAN", 16)
    rewards, values, starts = torch.randn(n), torch.randn(n), torch.tensor([0, n], dtype=torch.int32)
    expected = ops_oracle.gae(rewards, values, starts, 0.999, 0.98)
    found = gae_module.gae(rewards, values, starts, 0.999, 0.98, None, None)
    close(found[0], expected[0])


def test_gae_of_the_longest_sequence_is_exact_at_one():
    n = 131_072 + 1
    rewards, values = torch.randint(-3, 4, (n,)).float(), torch.randint(-8, 8, (n,)).float()
    starts = torch.tensor([0, n], dtype=torch.int32)
    advantages, returns = gae_module.gae(rewards, values, starts, 1.0, 1.0, None, torch.tensor([2.0]))
    to_come = rewards.double().flip(0).cumsum(0).flip(0) + 2.0
    assert torch.equal(returns.double(), to_come)
    assert torch.equal(advantages.double(), to_come - values.double())


def test_gae_of_nothing():
    empty, starts = torch.empty(0), torch.tensor([0, 0], dtype=torch.int32)
    assert [len(x) for x in gae_module.gae(empty, empty, starts, 1.0, 1.0, None, None)] == [0, 0]


@pytest.mark.parametrize("with_mask", [False, True])
def test_whiten_far_from_zero(with_mask, monkeypatch):
    """A mean 10,000 times the spread: E[x^2] - mean^2 would have no digit left."""
    monkeypatch.setattr(whiten_module, "BLOCK", 256)
    x = 10_000 + torch.randn(1500)
    mask = torch.rand(1500) < 0.6 if with_mask else None
    kept = (x if mask is None else x[mask]).double()
    if mask is not None:
        x[~mask] = torch.nan
    moments = whiten_module.moments(x, mask)
    expected = torch.stack([torch.tensor(float(len(kept))).double(), kept.mean(), (kept - kept.mean()).square().sum()])
    assert torch.allclose(moments, expected, rtol=1e-6)
    white = whiten_module.whiten(x, mask, moments, 1e-8)
    want = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt()
    close(white if mask is None else white[mask], want, 1e-4)
    assert mask is None or not white[~mask].any()


def test_moments_come_with_the_scan(monkeypatch):
    monkeypatch.setattr(gae_module, "BLOCK", 128)
    n, starts = 300, torch.tensor([0, 100, 300], dtype=torch.int32)
    rewards, values, mask = torch.randn(n), torch.randn(n), torch.rand(n) < 0.5
    advantages, _, moments = gae_module.gae_moments(rewards, values, starts, 1.0, 0.9, mask, None)
    assert torch.allclose(moments, whiten_module.moments(advantages, mask), rtol=1e-6)


def test_moments_of_nothing():
    assert whiten_module.moments(torch.randn(5), torch.zeros(5, dtype=torch.bool)).tolist() == [0, 0, 0]
    assert whiten_module.moments(torch.empty(0), None).tolist() == [0, 0, 0]


OPTIONS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0},
    {"proximal": True},
    {"proximal": True, "behaviour_cap": 1.3, "dual_clip": 2.0},
]


def run_ppo(current, sampled, advantages, options, mask=None, denominator=7.0, entropy=None, proximal=None):
    divisor = denominator if isinstance(denominator, torch.Tensor) else torch.tensor(denominator)
    return ppo_module.ppo_loss(
        current, sampled, advantages, proximal, entropy, mask, divisor, options.get("clip_low", 0.2),
        options.get("clip_high", 0.2), options.get("dual_clip"), options.get("behaviour_cap"),
    )  # fmt: skip


# one token; below, at and above a block of 256
@pytest.mark.parametrize(("n", "options"), [(1, OPTIONS[0]), (255, OPTIONS[1]), (256, OPTIONS[2]), (257, OPTIONS[3])])
def test_ppo_loss(n, options, monkeypatch):
    """Log-ratios of 1e-6 to 20, advantages of both signs, hidden tokens full of NaN."""
    monkeypatch.setattr(ppo_module, "BLOCK", 256)
    sampled, advantages, entropy = -3 * torch.rand(n), torch.randn(n), torch.rand(n)
    size = torch.logspace(-6, math.log10(19.9), n)
    current = (sampled + size * torch.where(torch.rand(n) < 0.5, -1.0, 1.0)).requires_grad_()
    proximal = (sampled + 0.4 * torch.randn(n)) if options.get("proximal") else None
    mask = torch.rand(n) < 0.8 if n > 1 else torch.ones(1, dtype=torch.bool)
    if proximal is not None:
        mask &= (current.detach() - proximal).abs() < 20
    denominator = 1 + torch.rand(n)
    keywords = {k: v for k, v in options.items() if k != "proximal"}
    if proximal is not None:
        keywords["proximal"] = proximal[mask]
    terms = ops_oracle.policy_loss_terms(current[mask], sampled[mask], advantages[mask], **keywords)
    expected = (terms / denominator[mask].double()).sum()
    (slope,) = torch.autograd.grad(expected, current)
    expected = expected.detach()
    stats = ops_oracle.policy_stats(current.detach()[mask], sampled[mask], advantages[mask], entropy[mask], **keywords)
    for x in (sampled, advantages, entropy, proximal, denominator):
        if x is not None:
            x[~mask] = torch.nan
    loss, slopes, found = run_ppo(current.detach(), sampled, advantages, options, mask, denominator, entropy, proximal)
    assert float(loss) == pytest.approx(float(expected), rel=2e-5)
    assert torch.allclose(slopes.double(), slope.double(), rtol=2e-5, atol=1e-9)
    totals = dict(zip(ppo_module.FIELDS, found.tolist(), strict=True))
    count = stats["tokens"]
    assert totals["tokens"] == count
    assert totals["loss"] == pytest.approx(float(expected), rel=2e-5)
    for name in ("clip_low", "clip_high", "clip_dual", "weight_capped"):
        assert totals[name] / count == pytest.approx(stats[name]), name
    means = {"ratio_sum": "ratio_mean", "k1_sum": "kl_k1", "k3_sum": "kl_k3", "weight_sum": "weight_mean"}
    for field, name in (means | {"entropy_sum": "entropy"}).items():
        assert totals[field] / count == pytest.approx(stats[name], rel=2e-5, abs=1e-7), name
    assert [totals["ratio_max"], totals["ratio_min"]] == pytest.approx(
        [stats["ratio_max"], stats["ratio_min"]], rel=2e-5
    )
    assert totals["rho_sum"] ** 2 / (count * totals["rho_sq_sum"]) == pytest.approx(stats["ess"], rel=5e-5)


@pytest.mark.parametrize("drift", [1e-5, 3e-4, -3e-4, 0.09, 0.49, 0.51, -2.0])
def test_k3_does_not_cancel(drift):
    """exp(d) - 1 - d in float32 is 0 for |d| below 3e-4; the right answer there is d^2 / 2."""
    sampled = torch.full((64,), -1.0)
    current = sampled + drift
    exact = (current - sampled).double()
    _, _, stats = run_ppo(current, sampled, torch.ones(64), {})
    found = stats[ppo_module.FIELDS.index("k3_sum")]
    assert float(found) == pytest.approx(float((torch.expm1(exact) - exact).sum()), rel=5e-6)


def test_tokens_beyond_the_limit_have_no_gradient_and_no_token_no_loss():
    loss, slopes, stats = run_ppo(
        torch.tensor([-1.0, -30.0]), torch.tensor([-25.0, -1.0]), torch.tensor([-1.0, 1.0]), {}
    )
    assert slopes.tolist() == [0, 0]
    assert math.isfinite(float(loss))
    assert torch.isfinite(stats).all()
    for n in (0, 3):
        hidden = torch.full((n,), torch.nan)
        loss, slopes, stats = run_ppo(hidden, hidden, hidden, {}, torch.zeros(n, dtype=torch.bool))
        assert float(loss) == 0 and not slopes.any()
        assert stats.tolist() == [0] * 6 + [-math.inf, math.inf] + [0] * 7


@pytest.mark.parametrize(("n", "clip"), [(1, 0.2), (255, None), (257, 0.2)])
def test_value_loss(n, clip, monkeypatch):
    monkeypatch.setattr(value_module, "BLOCK", 256)
    values = torch.randn(n).requires_grad_()
    old, returns, mask = values.detach() + 0.3 * torch.randn(n), torch.randn(n), torch.rand(n) < 0.7
    mask[0] = True
    terms = ops_oracle.value_loss_terms(values[mask], old[mask], returns[mask], clip)
    expected = terms.sum() / 5
    (slope,) = torch.autograd.grad(expected, values)
    expected = expected.detach()
    kept = [x.detach()[mask].double() for x in (values, returns)]
    old[~mask] = returns[~mask] = torch.nan
    loss, slopes, stats = value_module.value_loss(values.detach(), old, returns, mask, torch.tensor(5.0), clip)
    assert float(loss) == pytest.approx(float(expected), rel=2e-5)
    assert torch.allclose(slopes, slope, rtol=1e-5, atol=1e-7)
    error = kept[1] - kept[0]
    sums = [len(error), float(expected), None, kept[0].sum(), kept[1].sum(), kept[1].square().sum(), error.sum()]
    for name, found, want in zip(value_module.FIELDS, stats.tolist(), [*sums, error.square().sum()], strict=True):
        if want is None:
            assert found == int((slope[mask] == 0).sum()), name
        else:
            assert found == pytest.approx(float(want), rel=2e-5, abs=1e-5), name


def test_bitwise_repeatable(monkeypatch):
    monkeypatch.setattr(gae_module, "BLOCK", 256)
    x, starts = torch.randn(4, 500), torch.tensor([0, 100, 500], dtype=torch.int32)
    runs = [
        (
            *gae_module.gae_moments(x[0], x[1], starts, 0.99, 0.95, None, None),
            *run_ppo(x[0] / 9, x[1] / 9, x[2], {}),
            *value_module.value_loss(x[0], x[1], x[2], None, torch.tensor(3.0), 0.2),
            whiten_module.whiten(x[3], None, whiten_module.moments(x[3], None), 1e-8),
        )
        for _ in range(21)
    ]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
