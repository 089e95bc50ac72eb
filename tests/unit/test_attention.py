"""Packed attention equals attention on each sequence alone, in values and gradients, for every family."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_kit import FAMILIES, VOCAB, random_causal_lm
from torch import Tensor

from orz_async import ops
from orz_async.errors import ModelError
from orz_async.learner import attention, varlen
from orz_async.learner.attention import NAME, PackedLayout, packed_attention

# One token; lengths that fall into several groups; more than the sliding window of 5; equal lengths; a long tail.
BATCHES = ([1], [5, 31, 1, 17, 30, 3], [12, 12, 12], [64, 2, 2, 2])


def dense_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """What the documentation of flash_attn_varlen_func promises, sequence by sequence: [N, heads, width]."""
    assert causal
    assert cu_q.dtype == torch.int32
    assert longest_q == longest_k == int((cu_q[1:] - cu_q[:-1]).max())
    outputs = []
    for low, high in itertools.pairwise(cu_q.tolist()):
        queries, keys, values = (x[low:high].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        scale = softmax_scale if softmax_scale is not None else q.shape[2] ** -0.5
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(high - low)
        left = window_size[0] if window_size[0] >= 0 else high - low
        hidden = (at[None] > at[:, None]) | (at[None] < at[:, None] - left)
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_kernels_of_a_gpu_equal_padded(monkeypatch: pytest.MonkeyPatch, family: str, kernel: str) -> None:
    """flex_attention uncompiled; for flash-attention a function with its documented meaning stands in."""
    monkeypatch.setattr(varlen, "flash_function", lambda: dense_varlen)
    monkeypatch.setattr(varlen, "best", lambda query: getattr(varlen, kernel))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that flex_attention is slow uncompiled
        test_packed_equals_padded(family, [5, 31, 1, 17, 30, 3], gradients=kernel == "flash")


def test_shared_prompts_are_not_given_to_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "best", lambda query: None)
    assert PackedLayout.from_lengths([3, 1, 2]).in_order
    assert PackedLayout.from_lengths([3, 1, 2]).cu_seqlens_B1.tolist() == [0, 3, 4, 6]
    assert not PackedLayout([np.array([0, 1, 2]), np.array([0, 1, 3])]).in_order


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_packed_equals_padded(family: str, lengths: list[int], gradients: bool = True) -> None:
    model = random_causal_lm(family)
    rng = np.random.default_rng(1)
    sequences = [torch.from_numpy(rng.integers(0, VOCAB, n)) for n in lengths]
    weights_ND = torch.from_numpy(rng.normal(size=(sum(lengths), 32))).float()

    longest = max(lengths)
    tokens_BT = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in sequences])
    mask_BT = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padded_BTD = model.model(tokens_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    want_ND = padded_BTD[mask_BT]
    (want_ND * weights_ND).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model.set_attn_implementation(NAME)
    positions_N = torch.cat([torch.arange(n) for n in lengths])
    with torch.set_grad_enabled(gradients):
        got_ND = model.model(
            torch.cat(sequences)[None],
            position_ids=positions_N[None],
            use_cache=False,
            layout=PackedLayout.from_lengths(lengths),
        ).last_hidden_state[0]
    torch.testing.assert_close(got_ND, want_ND, atol=1e-5, rtol=1e-5)
    if not gradients:  # flex_attention has none on CPU
        return
    (got_ND * weights_ND).sum().backward()
    scale = max(grad.abs().max().item() for grad in want.values())
    for name, parameter in model.named_parameters():
        if name in want:
            assert parameter.grad is not None, name
            # Not 1e-5: with scores as large as these, the padded model's own float32 gradients are off by more.
            torch.testing.assert_close(parameter.grad, want[name], atol=3e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_sequences_go_through_padded_groups(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(attention, "_EXACT_LENGTH", 30)
    monkeypatch.setattr(ops, "attend_packed", None)
    test_packed_equals_padded(family, [5, 31, 1, 17, 30, 3])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_layout_holds_every_token_once_and_wastes_little(lengths: list[int]) -> None:
    layout = PackedLayout.from_lengths(lengths).padded
    rows = sum(count * longest for count, longest in layout.groups)
    assert sum(count for count, _ in layout.groups) == len(lengths)
    assert len(layout.source_P) == rows
    assert sorted(layout.target_N.tolist()) == sorted(set(layout.target_N.tolist()))
    # The row a token goes to copies that token.
    assert layout.source_P[layout.target_N].tolist() == list(range(sum(lengths)))
    assert rows <= sum(lengths) / 0.6 + len(lengths)
    assert len(layout.copies_C) == 0


def test_shared_rows_are_copied_and_their_copies_known() -> None:
    """Rows 0 to 2 are a prompt with three samples, the last of them without a further token."""
    rows = [np.array([0, 1, 2, 3, 4]), np.array([0, 1, 2, 5]), np.array([0, 1, 2]), np.array([6])]
    assert PackedLayout(rows).num_tokens == 7
    layout = PackedLayout(rows).padded
    assert layout.source_P[layout.target_N].tolist() == list(range(7))
    assert layout.source_P[layout.copies_C].tolist() == layout.copied_C.tolist() == [0, 1, 2, 0, 1, 2]
    assert not set(layout.copies_C.tolist()) & set(layout.target_N.tolist())
    with pytest.raises(ValueError, match="every row below 7"):
        PackedLayout([np.array([0, 6])])


def test_sequences_do_not_see_each_other() -> None:
    """Changing one sequence changes nothing in its neighbours, to the last bit."""
    model = random_causal_lm("qwen2")
    model.set_attn_implementation(NAME)
    lengths = [7, 9, 8]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens = torch.arange(sum(lengths))[None] % VOCAB
    other = tokens.clone()
    other[0, 7:16] = (other[0, 7:16] + 1) % VOCAB
    with torch.no_grad():
        first, second = (
            model.model(
                t, position_ids=positions, use_cache=False, layout=PackedLayout.from_lengths(lengths)
            ).last_hidden_state[0]
            for t in (tokens, other)
        )
    assert torch.equal(first[:7], second[:7])
    assert torch.equal(first[16:], second[16:])
    assert not torch.equal(first[7:16], second[7:16])


def test_what_it_cannot_compute_is_refused() -> None:
    x = torch.zeros(1, 2, 3, 4)
    layout = PackedLayout.from_lengths([3])
    with pytest.raises(ModelError, match="dropout"):
        packed_attention(torch.nn.Identity(), x, x, x, None, layout=layout, dropout=0.1)
    with pytest.raises(ModelError, match="sinks"):
        packed_attention(torch.nn.Identity(), x, x, x, None, layout=layout, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="layout"):
        packed_attention(torch.nn.Identity(), x, x, x, None, layout=PackedLayout.from_lengths([4]))
    with pytest.raises(ValueError, match="at least one token"):
        PackedLayout.from_lengths([3, 0])
