"""One token a row: the rule in float64, and rows that have no token."""

from __future__ import annotations

import pytest
import torch

from orz_async import ops

pytestmark = pytest.mark.usefixtures("ops_backend")


# Below, at and above a vector, the demo's vocabulary, and one of a large model.
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 105, 151_936])
def test_equals_float64(ops_backend: str, vocab: int) -> None:
    rows = 40
    logits_RV = 4 * torch.randn(rows, vocab)
    if vocab > 2:
        logits_RV[:, 1] = -torch.inf
    temperatures_R, uniforms_R = 0.3 + torch.rand(rows), torch.rand(rows, dtype=torch.float64)
    uniforms_R[:2] = torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)
    tokens_R, logprobs_R = ops.sample(logits_RV, temperatures_R, uniforms_R)
    exact_RV = torch.log_softmax(logits_RV.double() / temperatures_R.double()[:, None], dim=-1)
    chosen_R1 = exact_RV.gather(1, tokens_R[:, None])
    assert bool((chosen_R1 > -torch.inf).all())
    # Temperatures as low as 0.3 make numbers as large as 60, whose float32 is off by 2e-6; torch sums in float32.
    atol = 1e-6 if ops_backend == "cpu" else 5e-6 if vocab < 1000 else 5e-5
    torch.testing.assert_close(logprobs_R.double(), chosen_R1[:, 0], atol=atol, rtol=1e-7)
    cdf_RV = exact_RV.exp().cumsum(-1)
    above_R = cdf_RV.gather(1, tokens_R[:, None])[:, 0]
    assert bool((uniforms_R < above_R + 1e-6).all())
    assert bool((uniforms_R >= above_R - chosen_R1.exp()[:, 0] - 1e-6).all())


def test_rows_do_not_depend_on_each_other_or_on_threads() -> None:
    logits_RV, temperatures_R, uniforms_R = torch.randn(16, 105), torch.ones(16), torch.rand(16, dtype=torch.float64)
    tokens_R, logprobs_R = ops.sample(logits_RV, temperatures_R, uniforms_R)
    torch.set_num_threads(2)
    for row in range(16):
        one = slice(row, row + 1)
        token, logprob = ops.sample(logits_RV[one], temperatures_R[one], uniforms_R[one])
        assert (int(token), float(logprob)) == (int(tokens_R[row]), float(logprobs_R[row]))


def test_a_row_that_is_not_finite_says_so() -> None:
    inf, nan = torch.inf, torch.nan
    logits_RV = torch.tensor([[0.0, 1.0, 2.0], [nan, 1.0, 0.0], [0.0, inf, 0.0], [-inf, -inf, -inf], [0.0, -inf, nan]])
    tokens_R, logprobs_R = ops.sample(logits_RV, torch.ones(5), torch.full((5,), 0.5, dtype=torch.float64))
    assert logprobs_R.isfinite().tolist() == [True, False, False, False, False]
    assert bool(((tokens_R >= 0) & (tokens_R < 3)).all())


def test_what_does_not_fit_is_refused() -> None:
    logits_RV, ones_R = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="temperatures_R: expected shape"):
        ops.sample(logits_RV, ones_R[:1], ones_R.double())
    with pytest.raises(ValueError, match="uniforms_R: expected float64"):
        ops.sample(logits_RV, ones_R, ones_R)
    with pytest.raises(ValueError, match="logits_RV: expected"):
        ops.sample(logits_RV[0], ones_R, ones_R.double())
