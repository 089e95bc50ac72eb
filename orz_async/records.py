"""The nouns that travel between the stages. Plain data: no I/O, no torch.

Arrays are little-endian bytes with the dtype fixed in the field's comment; `int32_bytes`, `float32_bytes`, `as_int32`
and `as_float32` convert without copying on decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Kind = Literal["train", "eval"]
Finish = Literal["stop", "length"]


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """One problem: the tokens the policy sees and the answer the grader compares with."""

    prompt_id: str
    """Unique within its data set and stable across restarts: a content hash or the file's own id."""
    tokens: bytes
    """int32, with the prompt template already applied."""
    answer: str
    """The reference answer, as text."""


class Sampling(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """How a rollout is sampled. top-p, top-k and min-p do not exist here: they would bias the log-probs."""

    temperature: float
    max_new_tokens: int


class Lease(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The right to produce one rollout until a deadline the broker keeps."""

    kind: Kind
    rollout: int
    """Number in grant order, from 0, counted separately for each kind."""
    attempt: int
    """0 at the first grant of this rollout, +1 each time it is granted again; older attempts are fenced."""
    prompt_id: str
    prompt: bytes
    """int32 tokens."""
    answer: str
    sample: int
    """Index of this sample among the samples of its prompt."""
    seed: int
    """Of the sampler, in [0, 2**63): a function of run seed, kind, rollout. The same for every attempt."""
    version_floor: int
    """The oldest policy version that may sample a token of this rollout."""
    sampling: Sampling


class Span(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Response tokens from `start` (inclusive) to the next span's start were sampled by `version`."""

    version: int
    start: int


class Trajectory(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One finished, scored rollout. `response` and `logprobs` have one element per response token."""

    kind: Kind
    rollout: int
    attempt: int
    prompt_id: str
    sample: int
    prompt: bytes
    """int32 tokens."""
    response: bytes
    """int32 tokens, the last one is the end-of-sequence or stop token if finish is "stop"."""
    logprobs: bytes
    """float32, log-probability of each response token under the policy and temperature that sampled it."""
    spans: tuple[Span, ...]
    """Starts strictly increase from 0, versions strictly increase."""
    reward: float
    finish: Finish
    verdict: str
    """Why the reward is what it is, one word: correct, wrong, no_answer, truncated, timeout, ..."""
    generator: str
    """Name of the daemon that produced it."""
    generate_s: float
    """Seconds from admission to the engine until the last token."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def num_response_tokens(self) -> int:
        return len(self.response) // 4

    @property
    def version_first(self) -> int:
        """The oldest version among the tokens."""
        return self.spans[0].version

    def versions(self) -> NDArray[np.int32]:
        """int32 [T]: the version that sampled each response token."""
        versions_T = np.empty(self.num_response_tokens, np.int32)
        for span in self.spans:
            versions_T[span.start :] = span.version
        return versions_T


def int32_bytes(values: Sequence[int] | NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, dtype="<i4").tobytes()


def float32_bytes(values: Sequence[float] | NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def as_int32(data: bytes) -> NDArray[np.int32]:
    """A read-only view."""
    return np.frombuffer(data, dtype="<i4")


def as_float32(data: bytes) -> NDArray[np.float32]:
    """A read-only view."""
    return np.frombuffer(data, dtype="<f4")
