"""One optimizer step: learning rate, gradient norm, the check that nothing is infinite, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from orz_async.errors import CheckpointError, NumericError
from orz_async.learner import loading
from orz_async.learner.parallel import full_tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate by learner step, from 0: linear up to `lr` at step `warmup_steps` - 1, and on the whole run down
    towards `final` times that, linearly or along half a cosine; 1 keeps it constant."""

    lr: float
    warmup_steps: int
    final: float
    num_steps: int
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.shape == "cosine":
            # Past the end, which only a run that was extended reaches, the rate stays at its lowest.
            done = (1.0 - math.cos(math.pi * min(1.0, step / self.num_steps))) / 2
            return self.lr * warm * (1.0 - (1.0 - self.final) * done)
        return self.lr * warm * (1.0 - (1.0 - self.final) * step / self.num_steps)


class Optimizer:
    """AdamW over the parameters of one module, with float32 states."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        schedule: Schedule,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
        offload: bool = False,
    ) -> None:
        self.name = name
        self._offload = offload
        self.schedule = schedule
        self._grad_clip = grad_clip
        self._named = dict(module.named_parameters())
        self._adam = torch.optim.AdamW(
            list(self._named.values()), lr=schedule.lr, betas=betas, weight_decay=weight_decay, fused=True
        )

    def step(self, learner_step: int, loss: float) -> float:
        """Apply the accumulated gradients; returns their norm before clipping. `loss` is summed over ranks.

        Both numbers are equal on all ranks, so either all of them take the step or all raise. After a raise the
        gradients are gone and weights and moments are what they were.
        """
        grads = [p.grad for p in self._named.values() if p.grad is not None]
        norm = full_tensor(get_total_norm(grads))
        grad_norm = float(norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.forget()
            raise NumericError(
                f"{self.name}: expected a finite loss and gradient in learner step {learner_step}, found loss {loss} "
                f"and gradient norm {grad_norm}; the weights were not touched: lower the learning rate, or look at the "
                "rollouts of this step in the journal"
            )
        if grad_norm > self._grad_clip:
            clip_grads_with_norm_(list(self._named.values()), self._grad_clip, norm)
        for group in self._adam.param_groups:
            group["lr"] = self.schedule.at(learner_step)
        self._fetch()
        self._adam.step()
        self._send_away()
        self.forget()
        return grad_norm

    def forget(self) -> None:
        """Drop the accumulated gradients."""
        self._adam.zero_grad(set_to_none=True)

    def _fetch(self) -> None:
        """Moments that were sent to the host, back to where their parameters are."""
        if self._offload:
            self._move(lambda p: p.device)

    def _send_away(self) -> None:
        if self._offload:
            self._move(lambda p: torch.device("cpu"))

    def _move(self, where: Callable[[Tensor], torch.device]) -> None:
        for parameter, state in self._adam.state.items():
            for moment in _MOMENTS:
                state[moment] = state[moment].to(where(parameter))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Moments, sharded as they are, and step counts; nothing before the first step."""
        for name, parameter in self._named.items():
            state = self._adam.state.get(parameter)
            if state:
                yield f"step.{name}", state["step"]
                for moment in _MOMENTS:
                    yield f"{moment}.{name}", state[moment]

    @torch.no_grad()
    def load(self, file: Any) -> None:
        """Inverse of `state`, onto any number of ranks: this rank's rows of an open safetensors file."""
        found = set(file.keys())
        wanted = {f"{kind}.{name}" for kind in ("step", *_MOMENTS) for name in self._named}
        if found and found != wanted:
            raise CheckpointError(
                f"{self.name} optimizer: expected the states of {len(self._named)} parameters, found other names: "
                f"{sorted(found ^ wanted)[:4]}; the checkpoint belongs to another model"
            )
        for name, parameter in self._named.items() if found else ():
            state = {"step": file.get_tensor(f"step.{name}")}
            for moment in _MOMENTS:
                state[moment] = torch.empty_like(parameter)
                loading.copy_slice(state[moment], file.get_slice(f"{moment}.{name}"))
                if self._offload:
                    state[moment] = state[moment].cpu()
            self._adam.state[parameter] = state
