"""Attention of packed sequences, forward and backward, against float64 autograd; who sees whom, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orz_async import ops
from orz_async.ops import backend

# Rows 0 to 4 are a prompt with three samples, the last of which adds nothing; then one alone, then a prompt with two.
SHARED = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 7], [0, 1, 2, 3, 4], [8], [9, 10, 11, 12, 13], [9, 10, 14, 15, 16, 17]]
ROWS = 18


def sequences(rows: list[list[int]]) -> ops.Sequences:
    return ops.Sequences.of([np.array(each) for each in rows])


def inputs(heads: int, kv_heads: int, dim: int, rows: int = ROWS, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, dim))
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def plain(x: list[Tensor], rows: list[list[int]], scale: float, window: int | None) -> Tensor:
    """float64, one query at a time, each row from the first sequence that has it."""
    query, key, value = (each.double() for each in x)
    group = query.shape[1] // key.shape[1]
    outputs: dict[int, Tensor] = {}
    for sequence in rows:
        for position, row in enumerate(sequence):
            if row in outputs:
                continue
            first = 0 if window is None else max(0, position + 1 - window)
            seen = sequence[first : position + 1]
            keys, values = (each[seen].repeat_interleave(group, 1) for each in (key, value))
            weights = (torch.einsum("hd,lhd->hl", query[row], keys) * scale).softmax(-1)
            outputs[row] = torch.einsum("hl,lhd->hd", weights, values)
    return torch.stack([outputs[row] for row in range(len(query))])


def compared(x: list[Tensor], rows: list[list[int]], scale: float, window: int | None, tolerance: float) -> None:
    weight = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(9))
    found = ops.attend_packed(*x, sequences(rows), scale=scale, window=window)
    want = plain(x, rows, scale, window)
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad((found * weight).sum(), x)
    for name, made, exact in zip("qkv", got, torch.autograd.grad((want * weight).sum(), x), strict=True):
        size = float(exact.abs().max().clamp(min=1.0))
        error = float((made - exact).abs().max()) / size
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.usefixtures("ops_backend")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (8, 2, 16), (4, 1, 13), (3, 3, 40)])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_equals_float64(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    compared(inputs(heads, kv_heads, dim), SHARED, 0.3, window, 1e-5)


@pytest.mark.usefixtures("ops_backend")
def test_large_scores_are_summed_in_float64() -> None:
    x = [(each * 4).detach().requires_grad_() for each in inputs(2, 2, 64)]  # scores of hundreds
    found = ops.attend_packed(*x, sequences(SHARED), scale=1.0)
    torch.testing.assert_close(found.double(), plain(x, SHARED, 1.0, None), rtol=4e-6, atol=4e-6)


@given(st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 30), min_size=1, max_size=4)), min_size=1))
@settings(max_examples=30, deadline=None)
def test_any_prompts_with_any_samples(groups: list[tuple[int, list[int]]]) -> None:
    rows: list[list[int]] = []
    end = 0
    for prompt, responses in groups:
        start, end = end, end + prompt
        for response in responses:
            rows.append([*range(start, start + prompt), *range(end, end + response)])
            end += response
    with backend.using("cpu"):
        compared(inputs(2, 1, 8, end), rows, 0.5, None, 1e-5)


@pytest.mark.usefixtures("ops_backend")
def test_bits_depend_on_no_neighbour_and_on_no_number_of_threads() -> None:
    x = inputs(4, 2, 24)
    whole = ops.attend_packed(*x, sequences(SHARED), scale=0.2)
    gradients = torch.autograd.grad(whole.sum(), x)
    torch.set_num_threads(2)
    again = ops.attend_packed(*x, sequences(SHARED), scale=0.2)
    assert torch.equal(again, whole)
    for one, other in zip(torch.autograd.grad(again.sum(), x), gradients, strict=True):
        assert torch.equal(one, other)
    alone = ops.attend_packed(*(each[9:14] for each in x), sequences([[0, 1, 2, 3, 4]]), scale=0.2)
    assert torch.equal(alone, whole[9:14])


@pytest.mark.usefixtures("ops_backend")
def test_what_is_not_finite_stays_in_its_sequences() -> None:
    x = inputs(2, 2, 16)
    with torch.no_grad():
        x[1][5, 0, 3] = float("nan")  # seen by rows 5 and 6
        x[2][11, 1, 0] = float("nan")  # seen by 11, 12, 13
    finite = ops.attend_packed(*x, sequences(SHARED), scale=0.2).isfinite().flatten(1).all(1)
    assert not finite[[5, 6, 11, 12, 13]].any()
    assert finite[[7, 8, 14, 15, 16, 17]].all()


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = inputs(2, 2, 16)
    fits = sequences(SHARED)
    with pytest.raises(ValueError, match="key_NKD: expected float32"):
        ops.attend_packed(query, key.double(), value, fits, scale=1.0)
    with pytest.raises(ValueError, match="value_NKD: expected shape"):
        ops.attend_packed(query, key, value[1:], fits, scale=1.0)
    with pytest.raises(ValueError, match="value_NKD: expected 2 heads, found 1"):
        ops.attend_packed(query, key, value[:, :1].contiguous(), fits, scale=1.0)
    with pytest.raises(ValueError, match="query_NHD: expected a multiple of 2 heads, found 1"):
        ops.attend_packed(query[:, :1].contiguous(), key, value, fits, scale=1.0)
    with pytest.raises(ValueError, match="sequences: expected 18 rows, found 2"):
        ops.attend_packed(query, key, value, sequences([[0, 1]]), scale=1.0)
    with pytest.raises(ValueError, match="window: expected at least 1"):
        ops.attend_packed(query, key, value, fits, scale=1.0, window=0)


def test_sequences_that_share_more_than_their_start_are_refused() -> None:
    with pytest.raises(ValueError, match="every row below 7 in a sequence, found 2"):
        sequences([[0, 6]])
    with pytest.raises(ValueError, match="leading rows only, found others in sequence 1"):
        sequences([[0, 1, 2], [3, 1, 2]])
    assert sequences(SHARED).owned_B.tolist() == [0, 5, 5, 0, 0, 2]
