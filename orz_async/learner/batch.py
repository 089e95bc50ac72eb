"""Trajectories of one step as flat arrays, and packed microbatches cut out of them.

Everything per response token of a step lives in one array in rollout order (axis R), the same on every rank; a
microbatch is a list of sequences and the rows of R they own. So no result depends on how a step is packed or sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orz_async import ops
from orz_async.errors import DataError
from orz_async.learner.attention import PackedLayout
from orz_async.records import Trajectory, as_float32, as_int32


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rollouts one learner step trains on, in rollout order."""

    trajectories: tuple[Trajectory, ...]
    version: int
    """Of the policy that is about to be trained."""
    response_lengths_B: NDArray[np.int64]
    cu_responses_B1: NDArray[np.int32]
    """Response b owns rows cu[b] to cu[b + 1] of every array named _R."""
    input_lengths_B: NDArray[np.int64]
    """Prompt and response without the last response token, which nothing is predicted from."""
    targets_R: Tensor
    """int64: the response tokens."""
    sampled_logprobs_R: Tensor
    """float32: what the engine said when it sampled them."""
    lag_R: NDArray[np.int32]
    """`version` minus the version that sampled the token."""
    rewards_B: Tensor
    """float32."""

    @property
    def num_sequences(self) -> int:
        return len(self.trajectories)

    @property
    def num_response_tokens(self) -> int:
        return int(self.cu_responses_B1[-1])


def make_step_batch(trajectories: Sequence[Trajectory], *, version: int, max_lag: int) -> StepBatch:
    """Flatten; raise if a token is older than the bound the ledger promises, or younger than the policy itself."""
    responses_B = [as_int32(t.response) for t in trajectories]
    lengths_B = np.array([len(r) for r in responses_B], np.int64)
    prompts_B = np.array([t.num_prompt_tokens for t in trajectories], np.int64)
    if not len(trajectories) or lengths_B.min() < 1 or prompts_B.min() < 1:
        raise DataError("expected at least one rollout, each with a prompt and a response; found an empty one")
    lag_R = np.concatenate([version - t.versions() for t in trajectories])
    if lag_R.min() < 0 or lag_R.max() > max_lag:
        raise DataError(
            f"expected tokens sampled by versions {version - max_lag} to {version} (max_lag {max_lag}), found "
            f"{version - lag_R.max()} to {version - lag_R.min()}: the ledger's promise is broken, this is a bug"
        )
    return StepBatch(
        trajectories=tuple(trajectories),
        version=version,
        response_lengths_B=lengths_B,
        cu_responses_B1=np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int32),
        input_lengths_B=prompts_B + lengths_B - 1,
        targets_R=torch.from_numpy(np.concatenate(responses_B).astype(np.int64)),
        sampled_logprobs_R=torch.from_numpy(np.concatenate([as_float32(t.logprobs) for t in trajectories])),
        lag_R=lag_R.astype(np.int32),
        rewards_B=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
    )


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Sequences packed one after the other, on the device of the model.

    An empty one stands for a rank without work in this round: it holds one token that is masked out, so that the rank
    takes part in every collective of forward and backward and adds exactly nothing.
    """

    sequences: tuple[int, ...]
    """Numbers b within the step; empty for an empty microbatch."""
    tokens_N: Tensor
    positions_N: Tensor
    layout: PackedLayout
    rows_M: Tensor
    """int64: row of N whose hidden state predicts response token M."""
    step_rows_M: Tensor
    """int64: row of R that is response token M."""
    targets_M: Tensor
    sampled_logprobs_M: Tensor
    response_lengths_b: Tensor
    """int64, on the host: one per packed sequence."""
    mask_M: Tensor | None
    """None where every token counts."""

    @property
    def num_response_tokens(self) -> int:
        return len(self.rows_M) if self.sequences else 0


def make_microbatch(batch: StepBatch, sequences: Sequence[int], device: torch.device) -> Microbatch:
    if not sequences:
        return _empty_microbatch(device)
    tokens, rows, step_rows, start = [], [], [], 0
    for b in sequences:
        trajectory, responses = batch.trajectories[b], int(batch.response_lengths_B[b])
        tokens += [as_int32(trajectory.prompt), as_int32(trajectory.response)[:-1]]
        # The last prompt token predicts the first response token.
        first = start + trajectory.num_prompt_tokens - 1
        rows.append(np.arange(first, first + responses))
        step_rows.append(np.arange(batch.cu_responses_B1[b], batch.cu_responses_B1[b + 1]))
        start = first + responses
    lengths = [int(batch.input_lengths_B[b]) for b in sequences]
    step_rows_M = torch.from_numpy(np.concatenate(step_rows).astype(np.int64))
    return Microbatch(
        sequences=tuple(sequences),
        tokens_N=torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device),
        positions_N=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device),
        layout=PackedLayout(lengths, device),
        rows_M=torch.from_numpy(np.concatenate(rows)).to(device),
        step_rows_M=step_rows_M.to(device),
        targets_M=batch.targets_R[step_rows_M].to(device),
        sampled_logprobs_M=batch.sampled_logprobs_R[step_rows_M].to(device),
        response_lengths_b=torch.from_numpy(batch.response_lengths_B[list(sequences)]),
        mask_M=None,
    )


def _empty_microbatch(device: torch.device) -> Microbatch:
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return Microbatch(
        sequences=(),
        tokens_N=zero,
        positions_N=zero,
        layout=PackedLayout([1], device),
        rows_M=zero,
        step_rows_M=zero,
        targets_M=zero,
        sampled_logprobs_M=torch.zeros(1, device=device),
        response_lengths_b=torch.ones(1, dtype=torch.int64),
        mask_M=torch.zeros(1, dtype=torch.bool, device=device),
    )


def split(num_sequences: int, parts: int, *, seed: Sequence[int]) -> list[list[int]]:
    """Cut a step into at most `parts` parts of equal size (within one), every sequence in exactly one of them.

    Samples of one prompt stand side by side in rollout order; a seeded permutation spreads them over the parts. The
    permutation is a function of the seed alone, so that there is no generator state to save.
    """
    if parts == 1:
        return [list(range(num_sequences))]
    order = np.random.default_rng(list(seed)).permutation(num_sequences)
    parts = min(parts, num_sequences)
    bounds = [num_sequences * part // parts for part in range(parts + 1)]
    return [sorted(order[low:high].tolist()) for low, high in pairwise(bounds)]


def pack_part(
    batch: StepBatch, part: Sequence[int], *, max_tokens: int, num_ranks: int, attention_cost: float
) -> list[list[list[int]]]:
    """[rank][microbatch][sequence number b]; every rank gets the same number of microbatches, some perhaps empty.

    `attention_cost` is the cost of a pair of tokens in attention relative to that of a token in the linear layers.
    """
    lengths = [int(batch.input_lengths_B[b]) for b in part]
    bins = ops.pack(lengths, max_tokens=max_tokens, num_ranks=num_ranks, cost=(1.0, attention_cost))
    return [[[part[i] for i in sorted(members)] for members in rank] for rank in bins]
