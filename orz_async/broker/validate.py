"""Is this trajectory what its lease asked for? The wire has checked types and sizes; here meaning is checked."""

from __future__ import annotations

import itertools
import math

import numpy as np

from orz_async.broker.messages import Status
from orz_async.broker.wire import MAX_SLOTS
from orz_async.records import Lease, Trajectory, as_float32, as_int32

REWARD_RANGE = (-1.0, 1.0)
LOGPROB_SLACK = 1e-4
"""A log-probability above 0 by rounding alone passes."""
MAX_WORD = 64
"""Longest verdict, in characters."""


def problem_of(trajectory: Trajectory, lease: Lease, *, generator: str, vocab_size: int, published: int) -> str | None:
    """What is wrong, in a phrase for the generator's operator, or None.

    `published` is the newest version any generator can serve.
    """
    return (
        _identity(trajectory, lease, generator)
        or _tokens(trajectory, lease, vocab_size)
        or _versions(trajectory, lease, published)
        or _score(trajectory)
    )


def problem_of_status(status: Status, published: int, longest: int) -> str | None:
    """The same for a Status: what it claims must be possible. `longest` is the most tokens a lease allows."""
    if not 0 <= status.slots <= MAX_SLOTS:
        return f"{status.slots} slots, expected 0 to {MAX_SLOTS}"
    if not -1 <= status.version <= published:
        return f"serves version {status.version}, the newest one published is {published}"
    if len(status.progress) > MAX_SLOTS:
        return f"progress of {len(status.progress)} leases, nobody holds more than {MAX_SLOTS}"
    for progress in status.progress:
        if not 0 <= progress.tokens <= longest:
            return f"{progress.tokens} tokens of one lease, it allows {longest}"
    return None


def _identity(trajectory: Trajectory, lease: Lease, generator: str) -> str | None:
    for name in ("kind", "rollout", "attempt", "prompt_id", "sample", "prompt"):
        if getattr(trajectory, name) != getattr(lease, name):
            return f"{name} differs from the lease"
    if trajectory.generator != generator:
        return f"produced by {trajectory.generator!r:.80}, sent by {generator!r}"
    return None


def _tokens(trajectory: Trajectory, lease: Lease, vocab_size: int) -> str | None:
    num_bytes = len(trajectory.response)
    if num_bytes % 4 or num_bytes == 0:
        return f"response has {num_bytes} bytes, expected a positive multiple of 4"
    if len(trajectory.logprobs) != num_bytes:
        return f"logprobs have {len(trajectory.logprobs)} bytes, the response has {num_bytes}"
    num_tokens = num_bytes // 4
    longest = lease.sampling.max_new_tokens
    if num_tokens > longest:
        return f"{num_tokens} tokens, the lease allows {longest}"
    if trajectory.finish == "length" and num_tokens < longest:
        return f"finish is length after {num_tokens} tokens, the lease allows {longest}"
    tokens_T = as_int32(trajectory.response)
    # As unsigned numbers negative ones are beyond every vocabulary: one pass instead of two.
    if int(tokens_T.view(np.uint32).max()) >= vocab_size:
        return f"token ids from {tokens_T.min()} to {tokens_T.max()}, the vocabulary has {vocab_size}"
    logprobs_T = as_float32(trajectory.logprobs)
    smallest, largest = float(logprobs_T.min()), float(logprobs_T.max())  # either is NaN if there is one
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        return "a log-probability is not finite"
    if largest > LOGPROB_SLACK:
        return f"a log-probability is {largest:.3g}, above 0"
    return None


def _versions(trajectory: Trajectory, lease: Lease, published: int) -> str | None:
    spans = trajectory.spans
    if not spans or spans[0].start != 0:
        return "the version spans do not begin at token 0"
    for before, after in itertools.pairwise(spans):
        if after.start <= before.start or after.version <= before.version:
            return f"version spans do not increase: {before} then {after}"
    if spans[-1].start >= trajectory.num_response_tokens:
        return f"a version span begins at token {spans[-1].start} of {trajectory.num_response_tokens}"
    if spans[0].version < lease.version_floor:
        return f"sampled by version {spans[0].version}, the lease's floor is {lease.version_floor}"
    if spans[-1].version > published:
        return f"sampled by version {spans[-1].version}, the newest one published is {published}"
    return None


def _score(trajectory: Trajectory) -> str | None:
    low, high = REWARD_RANGE
    if not low <= trajectory.reward <= high:  # also false for NaN
        return f"reward {trajectory.reward} is not in [{low}, {high}]"
    if not 0 < len(trajectory.verdict) <= MAX_WORD or not trajectory.verdict.isprintable():
        return f"the verdict must be one printable word of at most {MAX_WORD} characters"
    if not (math.isfinite(trajectory.generate_s) and trajectory.generate_s >= 0):
        return f"generate_s is {trajectory.generate_s}"
    return None
