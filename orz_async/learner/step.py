"""What one learner step is made of: its batch with values and advantages, its rounds, and what an update says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orz_async.errors import NumericError
from orz_async.learner.batch import Microbatch, StepBatch
from orz_async.learner.model import PolicyTerms


@dataclass(frozen=True, slots=True)
class Round:
    """What one optimizer step trains on: this rank's microbatches, and counts over all ranks."""

    sequences: tuple[int, ...]
    """Numbers b within the step, of all ranks."""
    microbatches: list[Microbatch]
    num_tokens: int
    num_sequences: int
    num_packs: int


@dataclass(frozen=True, slots=True)
class Step:
    """A batch with what the frozen critic and the policy before the update made of it."""

    batch: StepBatch
    whole: Round
    values_R: Tensor
    advantages_R: Tensor
    """Whitened."""
    returns_R: Tensor
    start_logprobs_R: Tensor | None = None
    """Under the policy before the update; None where nothing needs them."""
    mix_R: Tensor | None = None
    """Share of the sampled log-prob in the proximal one; None: start_logprobs_R are the proximal ones."""
    keep_R: Tensor | None = None
    """bool; None: every token takes part in the policy loss."""
    broken: str = ""
    """Why this step is left out; empty where it is not."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a microbatch leaves behind for the statistics of its round."""

    row: Tensor
    micro: Microbatch
    logprobs_M: Tensor = field(default_factory=lambda: torch.empty(0))
    terms: PolicyTerms | None = None


@dataclass(slots=True)
class UpdateReport:
    """What an update said of itself, over all ranks; equal on every rank."""

    losses: list[float] = field(default_factory=list)
    """One per optimizer step that was taken."""
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping."""
    lr: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """Why optimizer steps were left out, one sentence each."""


def check_finite(x: Tensor, what: str, learner_step: int) -> Tensor:
    """`x` as it is. It must be equal on all ranks, so that all of them raise or none."""
    if not math.isfinite(float(x.detach().sum(dtype=torch.float64))):
        wrong = x[~x.isfinite()]
        found = wrong[0].item() if len(wrong) else "a sum that overflows"
        raise NumericError(
            f"expected finite {what} in learner step {learner_step}, found {found}; the weights or the rollouts hold "
            "infinities: resume from the last checkpoint with a lower learning rate"
        )
    return x
