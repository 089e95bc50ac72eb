"""The step as flat arrays, its parts and its microbatches: every token exactly once, in its right place."""

from __future__ import annotations

import learner_kit as kit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orz_async.errors import DataError
from orz_async.learner.batch import make_microbatch, make_step_batch, pack_part, split
from orz_async.records import as_float32, as_int32, int32_bytes

CPU = torch.device("cpu")


def test_microbatch_rows_predict_their_targets() -> None:
    trajectories = kit.rollouts(7, version=2, max_lag=1)
    batch = make_step_batch(trajectories, version=2, max_lag=1)
    micro = make_microbatch(batch, [5, 1, 3], CPU)
    start, row = 0, 0
    for b, trajectory in zip([5, 1, 3], [trajectories[i] for i in (5, 1, 3)], strict=True):
        prompt, response = as_int32(trajectory.prompt), as_int32(trajectory.response)
        length = len(prompt) + len(response) - 1
        inputs = np.concatenate([prompt, response])[:-1]
        assert micro.tokens_N[start : start + length].tolist() == inputs.tolist()
        assert micro.positions_N[start : start + length].tolist() == list(range(length))
        rows = micro.rows_M[row : row + len(response)]
        # The row before response token t holds prompt and response up to t - 1.
        assert rows.tolist() == [start + len(prompt) - 1 + t for t in range(len(response))]
        assert micro.targets_M[row : row + len(response)].tolist() == response.tolist()
        assert micro.sampled_logprobs_M[row : row + len(response)].numpy().tobytes() == trajectory.logprobs
        owned = micro.step_rows_M[row : row + len(response)].tolist()
        assert owned == list(range(batch.cu_responses_B1[b], batch.cu_responses_B1[b + 1]))
        start, row = start + length, row + len(response)
    assert (len(micro.tokens_N), len(micro.rows_M)) == (start, row)
    assert micro.layout.lengths_B == tuple(batch.input_lengths_B[[5, 1, 3]].tolist())
    assert micro.response_lengths_b.tolist() == batch.response_lengths_B[[5, 1, 3]].tolist()


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


@given(count=st.integers(1, 60), parts=st.integers(1, 80), seed=st.integers(0, 5))
@settings(deadline=None)
def test_split_drops_nothing_and_is_even(count: int, parts: int, seed: int) -> None:
    pieces = split(count, parts, seed=(seed, 4))
    assert sorted(b for piece in pieces for b in piece) == list(range(count))
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) == min(count, parts)
    assert max(sizes) - min(sizes) <= 1
    assert split(count, parts, seed=(seed, 4)) == pieces


def test_split_mixes_the_samples_of_a_prompt() -> None:
    """128 rollouts, four of a prompt side by side: a quarter must not be the first 8 prompts."""
    first = split(128, 4, seed=(0, 0, 2))[0]
    assert len({b // 4 for b in first}) > 16
    assert first != split(128, 4, seed=(0, 1, 2))[0]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    ranks=st.integers(1, 5),
    max_tokens=st.integers(5, 80),
)
@settings(deadline=None, max_examples=60)
def test_every_sequence_is_packed_once(lengths: list[int], ranks: int, max_tokens: int) -> None:
    rng = np.random.default_rng(0)
    trajectories = [
        kit.trajectory(rng, n, response=int32_bytes(np.zeros(length)), logprobs=np.zeros(length, "<f4").tobytes())
        for n, length in enumerate(lengths)
    ]
    batch = make_step_batch(trajectories, version=0, max_lag=0)
    part = list(range(0, len(lengths), 2)) or [0]
    bins = pack_part(batch, part, max_tokens=max_tokens, num_ranks=ranks, attention_cost=0.01)
    assert len(bins) == ranks
    assert len({len(rank) for rank in bins}) == 1
    assert sorted(b for rank in bins for members in rank for b in members) == part
    for members in (members for rank in bins for members in rank if len(members) > 1):
        assert batch.input_lengths_B[members].sum() <= max_tokens


def test_an_empty_microbatch_is_one_token_that_counts_nothing() -> None:
    batch = make_step_batch(kit.rollouts(2), version=0, max_lag=0)
    micro = make_microbatch(batch, [], CPU)
    assert micro.num_response_tokens == 0
    assert micro.mask_M is not None
    assert micro.mask_M.tolist() == [False]
