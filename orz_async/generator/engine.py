"""What the daemon needs of an inference engine, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from orz_async.broker.messages import LeaseRef, Progress
from orz_async.errors import EngineError
from orz_async.records import Finish, Lease, Span, as_int32

if TYPE_CHECKING:
    import torch


def ref_of(lease: Lease) -> LeaseRef:
    return LeaseRef(lease.kind, lease.rollout, lease.attempt)


class LeaseError(EngineError):
    """One lease cannot be finished. The engine has forgotten it and goes on with the others."""

    def __init__(self, lease: LeaseRef, reason: str) -> None:
        super().__init__(f"{lease.kind} rollout {lease.rollout} (attempt {lease.attempt}): {reason}")
        self.lease = lease
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished response. The arrays have one element per response token."""

    lease: Lease
    response: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    """Under the policy and the temperature that sampled the token."""
    spans: tuple[Span, ...]
    finish: Finish
    generate_s: float
    """From admission to a slot until the last token."""
    kv_version: int | None = None
    """Oldest version that computed keys and values which its tokens attended to; None: each token's own version."""

    def kv_age_T(self) -> NDArray[np.int32]:
        """[T] how many versions the oldest key a token attended to is older than the weights that sampled it."""
        ages_T = np.zeros(len(self.response), np.int32)
        if self.kv_version is not None:
            for span in self.spans:
                ages_T[span.start :] = span.version - self.kv_version
        return ages_T


@dataclass(frozen=True, slots=True)
class Partial:
    """What was sampled of a lease before it was cancelled. The arrays have one element per response token."""

    lease: Lease
    response: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    """As in Sample."""
    spans: tuple[Span, ...]
    """Empty only where an engine that works by itself did not say in time which versions sampled it."""


def check_lease(lease: Lease, max_model_tokens: int, vocab_size: int) -> None:
    """LeaseError if no engine of these bounds can ever run it."""
    prompt, new = as_int32(lease.prompt), lease.sampling.max_new_tokens
    if not len(prompt) or new < 1:
        raise LeaseError(ref_of(lease), f"expected at least one prompt token and one new, got {len(prompt)}, {new}")
    if len(prompt) + new > max_model_tokens:
        raise LeaseError(
            ref_of(lease),
            f"{len(prompt)} prompt tokens and {new} new ones exceed max_model_tokens {max_model_tokens}",
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise LeaseError(ref_of(lease), f"a prompt token is outside the vocabulary of {vocab_size}")


class Engine(Protocol):
    """Turns leases into samples. Not thread-safe: one loop calls it, and nothing happens between calls but waiting.

    A lease is queued, then running, then gone: returned by `poll`, cancelled, or reported by a LeaseError.
    """

    @property
    def version(self) -> int:
        """Of the weights served; -1 before the first `apply`."""

    @property
    def vocab_size(self) -> int:
        """Token ids of prompts and responses are below it."""

    @property
    def idle(self) -> bool:
        """No lease is queued or running: `poll` would do nothing."""

    @property
    def tokens_sampled(self) -> int:
        """Since the start; it never falls."""

    @property
    def steps_sampled(self) -> int | None:
        """Forwards that sampled tokens, since the start; None where an engine that works by itself does not tell."""

    def submit(self, lease: Lease) -> None:
        """Queue a lease. LeaseError if it can never run, whatever the weights."""

    def cancel(self, lease: LeaseRef) -> Partial | None:
        """Forget a lease, and hand back what was sampled of it: None if nothing was, or if it is not here."""

    def poll(self) -> list[Sample]:
        """Do a bounded piece of work, or wait a moment for an engine that works by itself; return what is finished.

        Raises LeaseError for a lease whose logits are not finite. Other leases lose nothing: call again.
        """

    def apply(self, version: int, tensors: Mapping[str, torch.Tensor]) -> str:
        """Serve these weights from the next token on, in running leases too; return the digest of what is served.

        All or nothing: EngineError, with the old weights in place, unless the tensors cover every parameter with its
        shape and are finite.
        """

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds of the parts of the last `apply`, by name; empty if it has none worth telling apart."""

    def progress(self) -> list[Progress]:
        """Every lease here, in a fixed order."""

    def close(self) -> None:
        """Free what is held. Idempotent."""
