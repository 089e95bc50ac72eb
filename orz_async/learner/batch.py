"""Trajectories of one step as flat arrays, and packed microbatches cut out of them.

Everything per response token of a step lives in one array in rollout order (axis R), the same on every rank; a
microbatch is a list of sequences and the rows of R they own. So no result depends on how a step is packed or sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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
    share_prompts: bool
    """Samples of one prompt are packed behind one copy of it."""

    @property
    def num_sequences(self) -> int:
        return len(self.trajectories)

    @property
    def num_response_tokens(self) -> int:
        return int(self.cu_responses_B1[-1])


def make_step_batch(
    trajectories: Sequence[Trajectory], *, version: int, max_lag: int, share_prompts: bool = True
) -> StepBatch:
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
        share_prompts=share_prompts,
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
    packed = _pack_tokens(batch, sequences)
    step_rows = [np.arange(batch.cu_responses_B1[b], batch.cu_responses_B1[b + 1]) for b in sequences]
    step_rows_M = torch.from_numpy(np.concatenate(step_rows).astype(np.int64))
    return Microbatch(
        sequences=tuple(sequences),
        tokens_N=torch.from_numpy(packed.tokens_N).to(device),
        positions_N=torch.from_numpy(packed.positions_N).to(device),
        layout=PackedLayout(packed.rows_B, device),
        rows_M=torch.from_numpy(packed.rows_M).to(device),
        step_rows_M=step_rows_M.to(device),
        targets_M=batch.targets_R[step_rows_M].to(device),
        sampled_logprobs_M=batch.sampled_logprobs_R[step_rows_M].to(device),
        response_lengths_b=torch.from_numpy(batch.response_lengths_B[list(sequences)]),
        mask_M=None,
    )


class _Packed(NamedTuple):
    tokens_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    rows_B: list[NDArray[np.int64]]
    """Packed rows of each sequence: its prompt's, then those of the response without its last token."""
    rows_M: NDArray[np.int64]


def _pack_tokens(batch: StepBatch, sequences: Sequence[int]) -> _Packed:
    tokens: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    start = 0

    def append(piece: NDArray[np.int32], position: int) -> NDArray[np.int64]:
        nonlocal start
        tokens.append(piece)
        positions.append(np.arange(position, position + len(piece)))
        start += len(piece)
        return np.arange(start - len(piece), start)

    prompts: dict[bytes, NDArray[np.int64]] = {}
    rows_B, rows = [], []
    for b in sequences:
        trajectory = batch.trajectories[b]
        if not batch.share_prompts or trajectory.prompt not in prompts:
            prompts[trajectory.prompt] = append(as_int32(trajectory.prompt), 0)
        prompt_rows = prompts[trajectory.prompt]
        response_rows = append(as_int32(trajectory.response)[:-1], len(prompt_rows))
        rows_B.append(np.concatenate([prompt_rows, response_rows]))
        # The last prompt token predicts the first response token.
        rows.append(rows_B[-1][len(prompt_rows) - 1 :])
    return _Packed(np.concatenate(tokens).astype(np.int64), np.concatenate(positions), rows_B, np.concatenate(rows))


def _empty_microbatch(device: torch.device) -> Microbatch:
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return Microbatch(
        sequences=(),
        tokens_N=zero,
        positions_N=zero,
        layout=PackedLayout.from_lengths([1], device),
        rows_M=zero,
        step_rows_M=zero,
        targets_M=zero,
        sampled_logprobs_M=torch.zeros(1, device=device),
        response_lengths_b=torch.ones(1, dtype=torch.int64),
        mask_M=torch.zeros(1, dtype=torch.bool, device=device),
    )


def split(batch: StepBatch, parts: int, *, seed: Sequence[int]) -> list[list[int]]:
    """Cut a step into at most `parts` parts of equal size (within one unit), every sequence in exactly one of them.

    The unit is a prompt with its samples where they share the cost of the prompt, unless there are fewer prompts than
    parts; else a single sequence. Neighbours are spread by a permutation that is a function of the seed alone, so that
    there is no generator state to save.
    """
    if parts == 1:
        return [list(range(batch.num_sequences))]
    units = _by_prompt(batch, range(batch.num_sequences))
    if len(units) < parts:
        units = [[b] for b in range(batch.num_sequences)]
    order = np.random.default_rng(list(seed)).permutation(len(units))
    parts = min(parts, len(units))
    bounds = [len(units) * part // parts for part in range(parts + 1)]
    return [sorted(b for unit in order[low:high] for b in units[unit]) for low, high in pairwise(bounds)]


def _by_prompt(batch: StepBatch, sequences: Sequence[int]) -> list[list[int]]:
    if not batch.share_prompts:
        return [[b] for b in sequences]
    units: dict[bytes, list[int]] = {}
    for b in sequences:
        units.setdefault(batch.trajectories[b].prompt, []).append(b)
    return list(units.values())


def pack_part(
    batch: StepBatch, part: Sequence[int], *, max_tokens: int, num_ranks: int, attention_cost: float
) -> list[list[list[int]]]:
    """[rank][microbatch][sequence number b]; every rank gets the same number of microbatches, some perhaps empty.

    The samples of a prompt stay together where they fit. `attention_cost` is the cost of a pair of tokens in attention
    relative to that of a token in the linear layers.
    """
    units: list[list[int]] = []
    lengths: list[int] = []
    for unit in _by_prompt(batch, part):
        alone = [int(batch.input_lengths_B[b]) for b in unit]
        shared = sum(alone) - (len(unit) - 1) * batch.trajectories[unit[0]].num_prompt_tokens
        fits = shared <= max_tokens
        units += [unit] if fits else [[b] for b in unit]
        lengths += [shared] if fits else alone
    bins = ops.pack(lengths, max_tokens=max_tokens, num_ranks=num_ranks, cost=(1.0, attention_cost))
    return [[sorted(b for i in members for b in units[i]) for members in rank] for rank in bins]
