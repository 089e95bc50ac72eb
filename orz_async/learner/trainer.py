"""The PPO step: values, advantages, policy update, critic update. Every rank calls the same methods in the same order.

A step is split in three calls because its weights travel while the critic trains: `begin` (values and advantages),
`update_policy` (then the caller publishes), `update_critic`. Each rank works on its own microbatches; what must be
whole (values, losses, gradients, statistics) is summed over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from orz_async import ops
from orz_async.config import Config
from orz_async.errors import NumericError
from orz_async.learner.advantage import advantages, loss_denominators
from orz_async.learner.batch import Microbatch, StepBatch, make_microbatch, make_step_batch, pack_part, split
from orz_async.learner.lag_table import LagTable
from orz_async.learner.model import Critic, Policy, PolicyTerms
from orz_async.learner.optim import Optimizer, Schedule
from orz_async.learner.parallel import World
from orz_async.records import Trajectory

_POLICY, _CRITIC = 1, 2  # which update a permutation is for, so that the two differ


@dataclass(frozen=True, slots=True)
class Round:
    """What one optimizer step trains on: this rank's microbatches, and counts over all ranks."""

    microbatches: list[Microbatch]
    num_tokens: int
    num_sequences: int
    num_packs: int


@dataclass(frozen=True, slots=True)
class Step:
    """A batch with what the frozen critic made of it."""

    batch: StepBatch
    whole: Round
    values_R: Tensor
    advantages_R: Tensor
    """Whitened."""
    returns_R: Tensor


@dataclass(slots=True)
class UpdateReport:
    """What an update said of itself, over all ranks; equal on every rank."""

    losses: list[float] = field(default_factory=list)
    """One per optimizer step."""
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping."""
    lr: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Policy, critic and their optimizers on this rank. `num_steps` learner steps are done: the policy version."""

    def __init__(self, config: Config, policy: Policy, critic: Critic, world: World) -> None:
        self.config = config
        self.world = world
        self.num_steps = 0
        self.policy = policy
        self.critic = critic
        dtype = getattr(torch, config.model.dtype)
        for module in (policy, critic):
            world.shard(module, module.layers, dtype=dtype)
        self.policy_optimizer = _optimizer("policy", policy, config, config.learner.lr)
        self.critic_optimizer = _optimizer("critic", critic, config, config.learner.critic_lr)

    @cached_property
    def _attention_cost(self) -> float:
        # Per layer and token: about 24 * width**2 operations in the linear layers; per pair of tokens 4 * width in the
        # attention, half of it masked away.
        return 1.0 / (12 * int(self.policy.config.hidden_size))

    def begin(self, trajectories: Sequence[Trajectory]) -> Step:
        """Values of every state under the critic as it is, then advantages whitened over the whole step."""
        learner = self.config.learner
        batch = make_step_batch(
            trajectories,
            version=self.num_steps,
            max_lag=self.config.broker.max_lag,
            # Copying keys and values of a prompt to its samples is cheap beside the linear layers of a CPU; the
            # attention kernels of a GPU read sequences where they lie.
            share_prompts=self.world.device.type == "cpu",
        )
        whole = self._round(batch, range(batch.num_sequences))
        values_R = self._everywhere(whole, self.critic)
        ends_B1 = torch.from_numpy(batch.cu_responses_B1)
        advantages_R, returns_R = advantages(
            batch.rewards_B.to(values_R), values_R, ends_B1.to(values_R.device), gamma=learner.gamma, lam=learner.lam
        )
        return Step(batch, whole, values_R, advantages_R, returns_R)

    def update_policy(self, step: Step) -> tuple[UpdateReport, LagTable]:
        """P optimizer steps. Log-probs of the first one are those of the version before it: they enter the mismatch."""
        learner = self.config.learner
        decoupled = learner.objective == "decoupled"
        proximal_R = self._logprobs(step) if decoupled and learner.policy_steps > 1 else None
        report, rows = UpdateReport(lr=self.policy_optimizer.schedule.at(self.num_steps)), []
        table = LagTable(self.config.broker.max_lag, step.batch.num_response_tokens)
        for index, part in enumerate(self._rounds(step, learner.policy_steps, _POLICY)):
            loss = torch.zeros((), dtype=torch.float64)
            for micro in part.microbatches:
                terms = PolicyTerms(
                    advantages_M=step.advantages_R[micro.step_rows_M],
                    denominator_M=self._denominators(part, micro),
                    clip_low=learner.clip_low,
                    clip_high=learner.clip_high,
                    dual_clip=learner.dual_clip,
                    behaviour_cap=learner.behaviour_cap if decoupled else None,
                    proximal_logprobs_M=None if proximal_R is None else proximal_R[micro.step_rows_M],
                    proximal_is_current=decoupled and proximal_R is None,
                )
                output = self.policy(micro, temperature=self.config.sampling.temperature, terms=terms)
                torch.autograd.backward(output.loss)
                loss += output.loss.detach().cpu()
                rows.append(output.stats.vector().cpu())
                if micro.sequences:
                    table.add(step.batch.lag_R, step.values_R, micro, output.logprobs_N, terms, at_version=index == 0)
            self._finish(report, self.policy_optimizer, loss)
        report.stats = ops.PpoStats.finalise([ops.PpoStats.from_vector(row) for row in self._all_rows(rows)])
        table.sum_over(self.world)
        return report, table

    def update_critic(self, step: Step) -> UpdateReport:
        """K optimizer steps over one K-th of the rollouts each; completes the learner step."""
        learner = self.config.learner
        report, rows = UpdateReport(lr=self.critic_optimizer.schedule.at(self.num_steps)), []
        for part in self._rounds(step, learner.critic_steps, _CRITIC):
            loss = torch.zeros((), dtype=torch.float64)
            for micro in part.microbatches:
                micro_loss, stats = ops.value_loss(
                    _finite(self.critic(micro), self.num_steps),
                    step.values_R[micro.step_rows_M],
                    step.returns_R[micro.step_rows_M],
                    clip=learner.value_clip,
                    mask_N=micro.mask_M,
                    denominator=self._denominators(part, micro),
                )
                torch.autograd.backward(micro_loss)
                loss += micro_loss.detach().cpu()
                rows.append(stats.vector().cpu())
            self._finish(report, self.critic_optimizer, loss)
        report.stats = ops.ValueStats.finalise([ops.ValueStats.from_vector(row) for row in self._all_rows(rows)])
        self.num_steps += 1
        return report

    def _finish(self, report: UpdateReport, optimizer: Optimizer, loss: Tensor) -> None:
        total = float(self.world.sum(loss))
        report.losses.append(total)
        report.grad_norms.append(optimizer.step(self.num_steps, total))

    def _all_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Statistics of every microbatch of every rank, which has as many of them as this one."""
        return [row for rank in self.world.gather(torch.stack(rows)) for row in rank.unbind()]

    def _rounds(self, step: Step, parts: int, purpose: int) -> list[Round]:
        if parts == 1:
            return [step.whole]
        batch = step.batch
        seed = (self.config.seed, self.num_steps, purpose)
        return [self._round(batch, part) for part in split(batch, parts, seed=seed)]

    def _round(self, batch: StepBatch, part: Sequence[int]) -> Round:
        bins = pack_part(
            batch,
            part,
            max_tokens=self.config.learner.max_tokens,
            num_ranks=self.world.size,
            attention_cost=self._attention_cost,
        )
        return Round(
            microbatches=[make_microbatch(batch, members, self.world.device) for members in bins[self.world.rank]],
            num_tokens=int(batch.response_lengths_B[list(part)].sum()),
            num_sequences=len(part),
            num_packs=sum(bool(members) for rank in bins for members in rank),
        )

    def _denominators(self, part: Round, micro: Microbatch) -> Tensor:
        return loss_denominators(
            self.config.learner.loss_aggregation,
            micro.response_lengths_b,
            num_tokens=part.num_tokens,
            num_sequences=part.num_sequences,
            num_packs=part.num_packs,
        ).to(self.world.device)

    def _logprobs(self, step: Step) -> Tensor:
        """Log-probs of the whole step under the policy as it is."""
        temperature = self.config.sampling.temperature
        return self._everywhere(step.whole, lambda micro: self.policy(micro, temperature=temperature)[0])

    def _everywhere(self, whole: Round, function: Callable[[Microbatch], Tensor]) -> Tensor:
        """`function`, one number per response token, over the whole step and on every rank; no gradients."""
        with torch.no_grad():
            results = [(micro, function(micro).cpu()) for micro in whole.microbatches]
        filled_R = torch.zeros(whole.num_tokens, dtype=results[0][1].dtype)
        for micro, result_M in results:
            if micro.sequences:
                filled_R[micro.step_rows_M.cpu()] = result_M
        # Every row was filled by one rank and is 0 on the others: the sum is exact.
        return _finite(self.world.sum(filled_R), self.num_steps).to(self.world.device)


def _finite(x: Tensor, learner_step: int) -> Tensor:
    if not math.isfinite(float(x.detach().sum(dtype=torch.float64))):
        raise NumericError(
            f"expected finite values and log-probs in learner step {learner_step}, found {x[~x.isfinite()][0].item()}; "
            "the weights hold or produce infinities: resume from the last checkpoint with a lower learning rate"
        )
    return x


def _optimizer(name: str, module: torch.nn.Module, config: Config, lr: float) -> Optimizer:
    learner = config.learner
    return Optimizer(
        name,
        module,
        schedule=Schedule(lr, learner.warmup_steps, learner.lr_final, config.steps),
        betas=learner.adam_betas,
        weight_decay=learner.weight_decay,
        grad_clip=learner.grad_clip,
    )
