"""The step as flat arrays, its parts and its microbatches: every token exactly once, in its right place."""

from __future__ import annotations

from pathlib import Path

import learner_kit as kit
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orz_async.errors import DataError
from orz_async.learner.batch import StepBatch, make_microbatch, make_step_batch, pack_part, split
from orz_async.learner.model import load_policy
from orz_async.records import as_float32, as_int32, int32_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [True, False])
def test_microbatch_rows_predict_their_targets(share: bool) -> None:
    trajectories = kit.rollouts(7, version=2, max_lag=1)
    batch = make_step_batch(trajectories, version=2, max_lag=1, share_prompts=share)
    micro = make_microbatch(batch, [5, 1, 4, 0], CPU)
    row = 0
    for b in (5, 1, 4, 0):
        prompt, response = as_int32(trajectories[b].prompt), as_int32(trajectories[b].response)
        inputs = np.concatenate([prompt, response])[:-1]
        rows = micro.rows_M[row : row + len(response)]
        # The row before response token t holds prompt and response up to t - 1; the response lies in one piece.
        assert micro.tokens_N[rows].tolist() == inputs[len(prompt) - 1 :].tolist()
        assert micro.positions_N[rows].tolist() == list(range(len(prompt) - 1, len(inputs)))
        assert micro.targets_M[row : row + len(response)].tolist() == response.tolist()
        assert micro.sampled_logprobs_M[row : row + len(response)].numpy().tobytes() == trajectories[b].logprobs
        owned = micro.step_rows_M[row : row + len(response)].tolist()
        assert owned == list(range(batch.cu_responses_B1[b], batch.cu_responses_B1[b + 1]))
        row += len(response)
    assert len(micro.rows_M) == row
    assert micro.response_lengths_b.tolist() == batch.response_lengths_B[[5, 1, 4, 0]].tolist()
    whole = batch.input_lengths_B[[5, 1, 4, 0]].sum()
    twice = trajectories[4].num_prompt_tokens + trajectories[0].num_prompt_tokens  # 4 and 5, 0 and 1 share a prompt
    assert len(micro.tokens_N) == whole - share * twice


def test_sharing_prompts_changes_nothing_but_the_work(tmp_path: Path) -> None:
    """Values, log-probs and gradients of shared and of separate prompts, for a family with a sliding window too."""
    for family in ("qwen2_windowed", "qwen3"):
        found = []
        for share in (True, False):
            policy = load_policy(kit.save_model(tmp_path / family, family))
            batch = make_step_batch(kit.rollouts(9, version=2, max_lag=1), version=2, max_lag=1, share_prompts=share)
            micro = make_microbatch(batch, range(9), CPU)
            logprobs_M, entropy_M = policy(micro, temperature=1.0)
            (logprobs_M * torch.arange(len(logprobs_M)).cos() + entropy_M).sum().backward()
            grads = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
            found.append((logprobs_M.detach(), grads))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_step_arrays_are_in_rollout_order() -> None:
    trajectories = kit.rollouts(6, version=3, max_lag=2)
    batch = make_step_batch(trajectories, version=3, max_lag=2)
    assert batch.targets_R.tolist() == np.concatenate([as_int32(t.response) for t in trajectories]).tolist()
    assert batch.sampled_logprobs_R.tolist() == np.concatenate([as_float32(t.logprobs) for t in trajectories]).tolist()
    assert batch.lag_R.tolist() == np.concatenate([3 - t.versions() for t in trajectories]).tolist()
    assert batch.rewards_B.tolist() == [t.reward for t in trajectories]
    assert set(batch.lag_R.tolist()) == {0, 2}


def test_an_empty_response_is_refused() -> None:
    empty = kit.trajectory(np.random.default_rng(0), 0, response=int32_bytes([]), logprobs=b"")
    with pytest.raises(DataError, match="empty"):
        make_step_batch([empty], version=0, max_lag=0)
    with pytest.raises(DataError, match="at least one rollout"):
        make_step_batch([], version=0, max_lag=0)


def step_of(prompts: list[int]) -> StepBatch:
    """As many rollouts as `prompts` has entries, equal entries with equal prompts."""
    made = kit.rollouts(len(prompts))
    return make_step_batch(
        [msgspec.structs.replace(t, prompt=int32_bytes([n])) for t, n in zip(made, prompts, strict=True)],
        version=0,
        max_lag=0,
    )


@given(prompts=st.lists(st.integers(0, 9), min_size=1, max_size=40), parts=st.integers(1, 50), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_split_drops_nothing_and_is_even(prompts: list[int], parts: int, seed: int) -> None:
    batch = step_of(prompts)
    pieces = split(batch, parts, seed=(seed, 4))
    assert sorted(b for piece in pieces for b in piece) == list(range(len(prompts)))
    assert len(pieces) == min(len(prompts), parts)
    if parts <= len(set(prompts)):
        units = [len({prompts[b] for b in piece}) for piece in pieces]
        assert sum(units) == len(set(prompts)), "the samples of a prompt stay together"
    else:
        units = [len(piece) for piece in pieces]
    assert max(units) - min(units) <= 1
    assert split(batch, parts, seed=(seed, 4)) == pieces


def test_split_mixes_prompts_anew_in_every_step() -> None:
    batch = step_of([n // 4 for n in range(128)])
    first, second = (split(batch, 4, seed=(0, step, 2))[0] for step in (0, 1))
    assert len(first) == 32
    assert first != list(range(32))
    assert first != second


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    ranks=st.integers(1, 5),
    max_tokens=st.integers(5, 80),
)
@settings(deadline=None, max_examples=60)
def test_every_sequence_is_packed_once(lengths: list[int], ranks: int, max_tokens: int) -> None:
    rng = np.random.default_rng(0)
    prompts = [int32_bytes(rng.integers(0, 9, n)) for n in range(1, 9)]
    trajectories = [
        kit.trajectory(
            rng,
            n,
            prompt=prompts[n // 3 % 8],
            response=int32_bytes(np.zeros(length)),
            logprobs=np.zeros(length, "<f4").tobytes(),
        )
        for n, length in enumerate(lengths)
    ]
    batch = make_step_batch(trajectories, version=0, max_lag=0)
    part = list(range(0, len(lengths), 2)) or [0]
    bins = pack_part(batch, part, max_tokens=max_tokens, num_ranks=ranks, attention_cost=0.01)
    assert len(bins) == ranks
    assert len({len(rank) for rank in bins}) == 1
    assert sorted(b for rank in bins for members in rank for b in members) == part
    for members in (members for rank in bins for members in rank if len(members) > 1):
        assert len(make_microbatch(batch, members, CPU).tokens_N) <= max_tokens


def test_an_empty_microbatch_is_one_token_that_counts_nothing() -> None:
    batch = make_step_batch(kit.rollouts(2), version=0, max_lag=0)
    micro = make_microbatch(batch, [], CPU)
    assert micro.num_response_tokens == 0
    assert micro.mask_M is not None
    assert micro.mask_M.tolist() == [False]
