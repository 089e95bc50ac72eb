"""ppo_loss, value_loss and what they say about themselves, against float64 and against one token at a time."""

from __future__ import annotations

import inspect
import math

import ops_oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orz_async import ops
from orz_async.ops import PpoStats, ValueStats

pytestmark = pytest.mark.usefixtures("ops_backend")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(1, 60),
    clip_low=st.sampled_from([0.0, 0.1, 0.2]),
    clip_high=st.sampled_from([0.0, 0.2, 0.28]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    decoupled=st.booleans(),
    cap=st.sampled_from([None, 0.9, 1.2]),
    drift=st.sampled_from([1e-6, 1e-2, 0.3, 2.0]),
    seed=st.integers(0, 10_000),
)
def test_ppo_loss_matches_the_formula(num_tokens, clip_low, clip_high, dual_clip, decoupled, cap, drift, seed) -> None:
    torch.manual_seed(seed)
    sampled = -3 * torch.rand(num_tokens)
    logprobs = (sampled + drift * torch.randn(num_tokens)).requires_grad_()
    proximal = sampled + drift * torch.randn(num_tokens) if decoupled else None
    advantages, entropy = torch.randn(num_tokens), torch.rand(num_tokens)
    mask = torch.rand(num_tokens) < 0.8
    mask[-1] = True
    options = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    options["behaviour_cap"] = cap if decoupled else None
    loss, stats = ops.ppo_loss(
        logprobs,
        sampled,
        advantages,
        proximal_logprobs_N=proximal,
        entropy_N=entropy,
        mask_N=mask,
        denominator=num_tokens,
        **options,
    )
    loss.backward()
    exact = logprobs.detach().double().requires_grad_()
    kept = (exact[mask], sampled[mask], advantages[mask])
    options["proximal"] = None if proximal is None else proximal[mask]
    want = ops_oracle.policy_loss_terms(*kept, **options).sum() / num_tokens
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    # At a ratio within rounding of a bound the gradient may be on either side of it; elsewhere it must agree.
    anchor = sampled if proximal is None else proximal
    ratio = (logprobs.detach().double() - anchor.double()).exp()
    bounds = [1 - clip_low, 1 + clip_high, dual_clip or 1e9]
    clear = torch.stack([(ratio - bound).abs() > 1e-5 for bound in bounds]).all(0)
    torch.testing.assert_close(logprobs.grad.double()[clear], exact.grad[clear], rtol=1e-4, atol=1e-7)
    said = PpoStats.finalise([stats])
    assert said.pop("loss") == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    kept = (logprobs.detach()[mask], sampled[mask], advantages[mask], entropy[mask])
    expected = ops_oracle.policy_stats(*kept, **options)
    if clear.all():
        assert said == pytest.approx(expected, rel=2e-4, abs=1e-7 * max(1.0, drift))


# From a ratio that differs from one in the seventh digit to e^20, where the log-ratio is limited.
@pytest.mark.parametrize(
    "d", [0.0, 1e-6, 1e-5, 3e-4, 1e-3, 0.0999, 0.1001, 1.0, 5.0, 20.0, -1e-6, -3e-4, -0.1, -5.0, -20.0]
)
def test_kl_of_any_size(d: float) -> None:
    sampled, now = torch.zeros(1), torch.tensor([d])
    _, stats = ops.ppo_loss(now, sampled, torch.ones(1), denominator=1)
    said = PpoStats.finalise([stats])
    exact = float(now.double())
    assert said["kl_k3"] == pytest.approx(math.fsum([math.expm1(exact), -exact]), rel=2e-6, abs=1e-18)
    assert said["kl_k1"] == -exact
    assert said["ratio_mean"] == pytest.approx(math.exp(exact), rel=1e-6)


def test_extreme_ratios_stay_finite() -> None:
    sampled = torch.tensor([-200.0, -200.0, -200.0, -0.1, 0.0])
    logprobs = torch.tensor([-0.1, -0.1, -0.1, -200.0, -200.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    loss, stats = ops.ppo_loss(logprobs, sampled, advantages, denominator=5)
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(x) for x in PpoStats.finalise([stats]).values())


def test_clip_by_hand() -> None:
    # ratio 1.5 with A > 0: clipped high. 1.5 with A < 0: not clipped. 0.5 with A < 0: clipped low. 0.5, A > 0: not.
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5, 4.0]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    loss, stats = ops.ppo_loss(logprobs, torch.zeros(5), advantages, dual_clip=3.0, denominator=1)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 + 1.5 + 0.8 - 0.5 + 3.0)
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1.5, 0.0, -0.5, 0.0])
    assert [float(x) for x in (stats.clip_high, stats.clip_low, stats.clip_dual)] == [1, 1, 1]


def test_on_policy_gradient_is_the_advantage() -> None:
    logprobs = -torch.rand(50)
    advantages = torch.randn(50)
    leaf = logprobs.clone().requires_grad_()
    loss, _ = ops.ppo_loss(leaf, logprobs, advantages, denominator=50)
    loss.backward()
    torch.testing.assert_close(leaf.grad, -advantages / 50)


def test_microbatches_add_up() -> None:
    sampled, advantages, entropy = -torch.rand(90), torch.randn(90), torch.rand(90)
    logprobs = sampled + 0.3 * torch.randn(90)
    whole_loss, whole = ops.ppo_loss(logprobs, sampled, advantages, entropy_N=entropy, denominator=90)
    parts = []
    for rows in (slice(0, 1), slice(1, 50), slice(50, 50), slice(50, 90)):
        kwargs = {"entropy_N": entropy[rows].clone(), "denominator": 90}
        parts.append(ops.ppo_loss(logprobs[rows].clone(), sampled[rows].clone(), advantages[rows].clone(), **kwargs))
    assert float(sum(loss for loss, _ in parts).detach()) == pytest.approx(whole_loss.item(), rel=1e-6)
    finalised = PpoStats.finalise([stats for _, stats in parts])
    assert finalised == pytest.approx(PpoStats.finalise([whole]), rel=1e-6)
    merged = parts[0][1].merge(parts[1][1]).merge(parts[2][1]).merge(parts[3][1])
    assert PpoStats.finalise([merged]) == pytest.approx(finalised, rel=1e-12)
    sent = [PpoStats.from_vector(stats.vector()) for _, stats in parts]
    assert PpoStats.finalise(sent) == finalised
    assert set(PpoStats.finalise([])) == set(finalised)


def test_a_denominator_for_each_token() -> None:
    sampled, advantages, divisor = -torch.rand(20), torch.randn(20), 1 + torch.rand(20)
    mask = torch.rand(20) < 0.5
    leaf = (sampled + 0.1).requires_grad_()
    loss, _ = ops.ppo_loss(leaf, sampled, advantages, mask_N=mask, denominator=divisor)
    loss.backward()
    want = (ops_oracle.policy_loss_terms(leaf.detach(), sampled, advantages) / divisor)[mask].sum()
    assert loss.item() == pytest.approx(float(want), rel=1e-5)
    assert not leaf.grad[~mask].any()
    value = torch.randn(20, requires_grad=True)
    loss, _ = ops.value_loss(value, torch.zeros(20), torch.ones(20), clip=None, mask_N=mask, denominator=divisor)
    loss.backward()
    torch.testing.assert_close(value.grad, torch.where(mask, (value.detach() - 1) / divisor, 0.0))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(1, 60), clip=st.sampled_from([None, 0.05, 0.2, 10.0]), seed=st.integers(0, 10_000))
def test_value_loss_matches_the_formula(num_tokens: int, clip: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(num_tokens, requires_grad=True)
    old_values, returns = values.detach() + 0.3 * torch.randn(num_tokens), torch.randn(num_tokens)
    mask = torch.rand(num_tokens) < 0.8
    mask[0] = True
    loss, stats = ops.value_loss(values, old_values, returns, clip=clip, mask_N=mask, denominator=11.0)
    loss.backward()
    exact = values.detach().double().requires_grad_()
    want = ops_oracle.value_loss_terms(exact, old_values, returns, clip)[mask].sum() / 11
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(values.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    said = ValueStats.finalise([stats])
    error = (returns - values.detach()).double()[mask]
    assert said["tokens"] == int(mask.sum())
    assert said["value_mean"] == pytest.approx(float(values.detach()[mask].mean()), rel=1e-5, abs=1e-6)
    assert said["return_mean"] == pytest.approx(float(returns[mask].mean()), rel=1e-5, abs=1e-6)
    assert said["error_rms"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5)
    if len(error) > 1:
        want_explained = 1 - float(error.var(correction=0)) / float(returns[mask].double().var(correction=0))
        assert said["explained_variance"] == pytest.approx(want_explained, rel=1e-3, abs=1e-3)
    assert said["clipped"] == pytest.approx(float((exact.grad[mask] == 0).double().mean()), abs=1e-9)


def test_explained_variance_of_constant_returns_is_zero() -> None:
    _, stats = ops.value_loss(torch.randn(100), torch.zeros(100), torch.ones(100), denominator=1)
    assert ValueStats.finalise([stats])["explained_variance"] == 0.0
    assert ValueStats.finalise([]) == dict.fromkeys(ValueStats.finalise([stats]), 0.0)


def test_masked_rows_are_not_read_and_bits_repeat() -> None:
    sampled, advantages, mask = -torch.rand(300), torch.randn(300), torch.rand(300) < 0.5
    logprobs = sampled + 0.2 * torch.randn(300)

    def both() -> list[torch.Tensor]:
        policy, policy_stats = ops.ppo_loss(logprobs, sampled, advantages, mask_N=mask, denominator=9)
        value, value_stats = ops.value_loss(logprobs, sampled, advantages, mask_N=mask, denominator=9)
        return [policy, value, policy_stats.vector(), value_stats.vector()]

    first = both()
    for x in (logprobs, sampled, advantages):
        x[~mask] = torch.nan
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, both(), strict=True))


def test_no_tokens() -> None:
    leaf = torch.randn(4, requires_grad=True)
    nothing = torch.zeros(4, dtype=torch.bool)
    loss, stats = ops.ppo_loss(leaf, torch.zeros(4), torch.ones(4), mask_N=nothing, denominator=1)
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()
    assert set(PpoStats.finalise([stats]).values()) == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 0.0}, "clip: expected a positive finite number"),
        ({"old_values_N": torch.zeros(3)}, r"old_values_N: expected shape \[4\]"),
        ({"returns_N": torch.full((4,), torch.nan)}, "returns_N: expected finite numbers, found nan at index 0"),
        ({"denominator": "4"}, "denominator: expected a positive finite number"),
        ({"denominator": torch.tensor(4)}, "denominator: expected float32 or float64, found int64"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    good = {name: torch.zeros(4) for name in ("values_N", "old_values_N", "returns_N")} | {"denominator": 4}
    ops.value_loss(**good)
    with pytest.raises(ValueError, match=message):
        ops.value_loss(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs_N": torch.zeros(4, 1)}, r"logprobs_N: expected shape \['any'\], found shape \[4, 1\]"),
        ({"logprobs_N": torch.zeros(8)[::2]}, "logprobs_N: expected a contiguous tensor"),
        ({"sampled_logprobs_N": torch.zeros(3)}, r"sampled_logprobs_N: expected shape \[4\], found shape \[3\]"),
        ({"sampled_logprobs_N": torch.zeros(4, device="meta")}, "sampled_logprobs_N: expected device cpu, found meta"),
        (
            {"advantages_N": torch.tensor([0, 0, torch.inf, 0])},
            "advantages_N: expected .*, found inf at index 2",
        ),
        ({"advantages_N": torch.zeros(4).int()}, "advantages_N: expected float32 or .*, found int32"),
        ({"proximal_logprobs_N": torch.full((4,), torch.nan)}, "proximal_logprobs_N: expected finite numbers"),
        ({"entropy_N": torch.zeros(5)}, r"entropy_N: expected shape \[4\]"),
        ({"mask_N": torch.ones(3, dtype=torch.bool)}, r"mask_N: expected shape \[4\]"),
        ({"clip_low": 1.5}, r"clip_low: expected a number in \[0.0, 1.0\], found 1.5"),
        ({"clip_high": -0.2}, "clip_high: expected a number"),
        ({"dual_clip": 1.1}, "dual_clip: expected a number in"),
        ({"behaviour_cap": 2.0}, "behaviour_cap: expected proximal_logprobs_N beside it"),
        ({"denominator": 0}, "denominator: expected a positive finite number, found 0"),
    ],
)
def test_bad_policy_input_is_named(change: dict[str, object], message: str) -> None:
    good = {name: torch.zeros(4) for name in ("logprobs_N", "sampled_logprobs_N", "advantages_N")} | {"denominator": 4}
    ops.ppo_loss(**good)
    with pytest.raises(ValueError, match=message):
        ops.ppo_loss(**(good | change))


def test_the_contract_of_names_and_order() -> None:
    """What callers rely on: arguments in this order, the rest by name, and every statistic under its name."""
    expected = {
        ops.gae: "rewards_N values_N cu_seqlens_B1 * gamma lam mask_N bootstrap_B",
        ops.whiten: "x_N mask_N * eps over group",
        ops.logprob: "logits_NV targets_N * temperature backward_in_place",
        ops.head_logprob: "hidden_ND weight_VD targets_N * temperature chunk",
        ops.ppo_loss: "logprobs_N sampled_logprobs_N advantages_N * proximal_logprobs_N entropy_N clip_low clip_high "
        "dual_clip behaviour_cap mask_N denominator",
        ops.value_loss: "values_N old_values_N returns_N * clip mask_N denominator",
        ops.ppo_head: "hidden_ND weight_VD targets_N sampled_logprobs_N advantages_N * temperature "
        "proximal_logprobs_N clip_low clip_high dual_clip behaviour_cap mask_N denominator chunk",
        ops.pack: "lengths_B * max_tokens num_ranks cost",
        ops.delta_encode: "new old * threads",
        ops.delta_apply: "tensor payload * threads",
    }
    for op, text in expected.items():
        found, by_name = [], False
        for parameter in inspect.signature(op).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not by_name:
                found.append("*")
                by_name = True
            found.append(parameter.name)
        assert " ".join(found) == text, op.__name__
    defaults = {k: p.default for k, p in inspect.signature(ops.ppo_head).parameters.items()}
    assert (defaults["temperature"], defaults["clip_low"], defaults["clip_high"]) == (1.0, 0.2, 0.2)
    assert [defaults[k] for k in ("dual_clip", "behaviour_cap", "mask_N", "chunk")] == [None] * 4
    assert defaults["denominator"] is inspect.Parameter.empty
    x = torch.zeros(3)
    out = ops.ppo_head(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3).long(), x, x, denominator=3)
    assert out._fields == ("loss", "logprobs_N", "entropy_N", "stats")
    _, stats = ops.ppo_loss(x, x, x, denominator=3)
    promised = {"tokens", "clip_low", "clip_high", "ratio_mean", "ratio_max", "ratio_min", "kl_k1", "kl_k3"}
    promised |= {"weight_mean", "weight_capped", "entropy", "ess"}
    for said in (PpoStats.finalise([stats]), PpoStats.finalise([out.stats])):
        assert promised <= set(said)
    _, stats = ops.value_loss(x, x, x, denominator=3)
    assert {"tokens", "clipped", "error_rms", "explained_variance"} <= set(ValueStats.finalise([stats]))
