"""The PPO step: values, advantages, policy update, critic update. Every rank calls the same methods in the same order.

A step is split in three calls because its weights travel while the critic trains: `begin` (values and advantages),
`update_policy` (then the caller publishes), `update_critic`. Each rank works on its own microbatches; what must be
whole (values, losses, gradients, statistics) is summed over ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from orz_async import ops
from orz_async.config import Config
from orz_async.errors import NumericError, OutOfMemoryError
from orz_async.learner.advantage import advantages, loss_denominators, outcome_advantages
from orz_async.learner.batch import Microbatch, StepBatch, make_microbatch, make_step_batch, pack_part, split
from orz_async.learner.correction import keep_mask, proximal_mix
from orz_async.learner.lag_table import LagTable
from orz_async.learner.model import Critic, Policy, PolicyTerms
from orz_async.learner.optim import Optimizer, Schedule
from orz_async.learner.parallel import World
from orz_async.learner.sample import response_rows, sampled_members
from orz_async.learner.step import Kept, Round, Step, UpdateReport, check_finite
from orz_async.ops.stats import VALUE_FIELDS
from orz_async.records import Trajectory

log = logging.getLogger(__name__)

_POLICY, _CRITIC = 1, 2  # which update a permutation is for, so that the two differ


class Trainer:
    """Policy, critic and their optimizers on this rank. `num_steps` learner steps are done: the policy version."""

    def __init__(self, config: Config, policy: Policy, critic: Critic | None, world: World) -> None:
        learner = config.learner
        self.config = config
        self.world = world
        self.num_steps = 0
        self.policy = policy
        self.critic = critic if learner.estimator == "gae" else None
        self._max_tokens = learner.max_tokens
        self._skipped_in_a_row = 0
        for module in (policy, critic):
            if module is None:
                continue
            if learner.compile:
                for layer in module.layers:
                    layer.compile(dynamic=True)
            world.shard(
                module,
                module.layers,
                dtype=getattr(torch, config.model.dtype),
                ranks=learner.shard_ranks,
                recompute=learner.activation_checkpointing,
            )
        self.policy_optimizer = _optimizer("policy", policy, config, learner.lr)
        self.critic_optimizer = (
            None if self.critic is None else _optimizer("critic", self.critic, config, learner.critic_lr)
        )

    @cached_property
    def _attention_cost(self) -> float:
        # Per layer and token: about 24 * width**2 operations in the linear layers; per pair of tokens 4 * width in the
        # attention, half of it masked away.
        return 1.0 / (12 * int(self.policy.config.hidden_size))

    def begin(self, trajectories: Sequence[Trajectory]) -> Step:
        """Values of every state under the critic as it is, then advantages whitened over the whole step.

        Something that is not finite raises NumericError on every rank, or makes a step that the updates leave out.
        """
        batch = make_step_batch(
            trajectories,
            version=self.num_steps,
            max_lag=self.config.broker.max_lag,
            # Copying keys and values of a prompt to its samples is cheap beside the linear layers of a CPU; the
            # attention kernels of a GPU read sequences where they lie.
            share_prompts=self.world.device.type == "cpu",
        )
        whole = self._round(batch, range(batch.num_sequences))
        try:
            check_finite(batch.rewards_B, "rewards", self.num_steps)
            check_finite(batch.sampled_logprobs_R, "log-probs of the engine", self.num_steps)
            return Step(batch, whole, *self._advantages(batch, whole), *self._proximal(batch, whole))
        except NumericError as error:
            if self.config.guard.nonfinite == "stop":
                raise
            nothing_R = torch.zeros(batch.num_response_tokens, device=self.world.device)
            return Step(batch, whole, nothing_R, nothing_R, nothing_R, broken=str(error))

    def _advantages(self, batch: StepBatch, whole: Round) -> tuple[Tensor, Tensor, Tensor]:
        """(values_R, advantages_R, returns_R). Without a critic values are 0 and returns the rewards."""
        learner = self.config.learner
        if learner.estimator != "gae":
            lengths_B = torch.from_numpy(batch.response_lengths_B)
            groups = [t.prompt_id for t in batch.trajectories]
            advantages_R = outcome_advantages(batch.rewards_B, groups, lengths_B, estimator=learner.estimator)
            returns_R = batch.rewards_B.repeat_interleave(lengths_B)
            device = self.world.device
            return torch.zeros_like(returns_R).to(device), advantages_R.to(device), returns_R.to(device)
        assert self.critic is not None
        with self._critic_at_home():
            values_R = self._everywhere(whole, self.critic, "values")
        ends_B1 = torch.from_numpy(batch.cu_responses_B1)
        advantages_R, returns_R = advantages(
            batch.rewards_B.to(values_R), values_R, ends_B1.to(values_R.device), gamma=learner.gamma, lam=learner.lam
        )
        return values_R, advantages_R, returns_R

    def _proximal(self, batch: StepBatch, whole: Round) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(log-probs_R at the start of the step, mix_R, keep_R), each only where this configuration needs it."""
        learner = self.config.learner
        decoupled, masked = learner.objective == "decoupled", learner.mismatch_mask != "none"
        interpolated = learner.proximal == "interpolated"
        mix_R = keep_R = start_R = None
        if masked or (decoupled and not interpolated and learner.policy_steps > 1):
            start_R = self._logprobs(whole)
        if decoupled and interpolated:
            mix_R = proximal_mix(batch.lag_R).to(self.world.device)
        elif decoupled and learner.policy_steps == 1:
            # The policy has not moved yet: its own log-probs are the proximal ones, and the ratio is exactly 1.
            mix_R = torch.zeros(batch.num_response_tokens, device=self.world.device)
        if start_R is not None and learner.mismatch_mask != "none":
            keep_R = keep_mask(
                start_R,
                batch.sampled_logprobs_R.to(start_R.device),
                torch.from_numpy(batch.response_lengths_B),
                unit=learner.mismatch_mask,
                above=learner.mismatch_mask_above,
            )
        return start_R, mix_R, keep_R

    def update_policy(self, step: Step) -> tuple[UpdateReport, LagTable]:
        """P optimizer steps. Log-probs of the first one are those of the version before it: they enter the mismatch.

        While the critic warms up, and where the step is broken, nothing is done.
        """
        learner = self.config.learner
        report, rows = UpdateReport(lr=self.policy_optimizer.schedule.at(self.num_steps)), []
        table = LagTable(self.config.broker.max_lag, step.batch.num_response_tokens)
        if step.broken or self.num_steps < learner.critic_warmup_steps:
            report.lr = 0.0
            report.skipped += [step.broken] if step.broken else []
            report.stats = ops.PpoStats.finalise([])
            return report, table

        def run(micro: Microbatch, part: Round) -> tuple[Tensor, Kept]:
            terms = self._terms(step, micro, part)
            output = self.policy(micro, temperature=self.config.sampling.temperature, terms=terms)
            logprobs_M = output.logprobs_N
            if terms.mask_M is not None and step.start_logprobs_R is not None:
                logprobs_M = torch.where(terms.mask_M, logprobs_M, step.start_logprobs_R[micro.step_rows_M])
            return output.loss, Kept(output.stats.vector().cpu(), micro, logprobs_M, terms)

        for index, part in enumerate(self._rounds(step, learner.policy_steps, _POLICY)):
            loss, kept = self._accumulate(step.batch, part, run, self.policy_optimizer)
            for made in kept:
                rows.append(made.row)
                if made.micro.sequences:
                    assert made.terms is not None
                    table.add(
                        step.batch.lag_R, step.values_R, made.micro, made.logprobs_M, made.terms, at_version=index == 0
                    )
            self._finish(report, self.policy_optimizer, loss)
        report.stats = ops.PpoStats.finalise([ops.PpoStats.from_vector(row) for row in self._all_rows(rows)])
        if step.keep_R is not None:
            report.stats["masked"] = 1.0 - float(step.keep_R.double().mean())
        table.sum_over(self.world)
        table.share(self.world, response_rows(step.batch, sampled_members(self.config, step.batch)))
        return report, table

    def _terms(self, step: Step, micro: Microbatch, part: Round) -> PolicyTerms:
        learner = self.config.learner
        decoupled = learner.objective == "decoupled"
        mask_M = None if step.keep_R is None else step.keep_R[micro.step_rows_M]
        if mask_M is not None and micro.mask_M is not None:
            mask_M &= micro.mask_M
        recomputed = decoupled and step.mix_R is None
        return PolicyTerms(
            advantages_M=step.advantages_R[micro.step_rows_M],
            denominator_M=self._denominators(part, micro),
            clip_low=learner.clip_low,
            clip_high=learner.clip_high,
            dual_clip=learner.dual_clip,
            behaviour_cap=learner.behaviour_cap if decoupled else None,
            proximal_logprobs_M=(
                step.start_logprobs_R[micro.step_rows_M] if recomputed and step.start_logprobs_R is not None else None
            ),
            proximal_mix_M=None if step.mix_R is None else step.mix_R[micro.step_rows_M],
            mask_M=mask_M,
        )

    def update_critic(self, step: Step) -> UpdateReport:
        """K optimizer steps over one K-th of the rollouts each; completes the learner step, also without a critic."""
        learner, optimizer = self.config.learner, self.critic_optimizer
        report, rows = UpdateReport(), []
        if self.critic is not None and optimizer is not None and not step.broken:
            report.lr = optimizer.schedule.at(self.num_steps)
            critic = self.critic

            def run(micro: Microbatch, part: Round) -> tuple[Tensor, Kept]:
                values_M = critic(micro)
                if not bool(values_M.detach().isfinite().all()):
                    # Not an error of this rank alone: the sum of the losses is what all ranks look at.
                    return values_M.sum() * float("nan"), Kept(torch.zeros(len(VALUE_FIELDS)).double(), micro)
                loss, stats = ops.value_loss(
                    values_M,
                    step.values_R[micro.step_rows_M],
                    step.returns_R[micro.step_rows_M],
                    clip=learner.value_clip,
                    mask_N=micro.mask_M,
                    denominator=self._denominators(part, micro),
                )
                return loss, Kept(stats.vector().cpu(), micro)

            with self._critic_at_home():
                for part in self._rounds(step, learner.critic_steps, _CRITIC):
                    loss, kept = self._accumulate(step.batch, part, run, optimizer)
                    rows += [made.row for made in kept]
                    self._finish(report, optimizer, loss)
            rows = self._all_rows(rows)
        report.stats = ops.ValueStats.finalise([ops.ValueStats.from_vector(row) for row in rows])
        report.skipped += [step.broken] if step.broken else []
        self.num_steps += 1
        return report

    def conclude(self, *reports: UpdateReport) -> None:
        """All ranks, after each step: NumericError where more steps in a row were left out than guard.max_skips."""
        reasons = [reason for report in reports for reason in report.skipped]
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if reasons else 0
        if self._skipped_in_a_row > self.config.guard.max_skips:
            raise NumericError(
                f"expected at most guard.max_skips = {self.config.guard.max_skips} steps in a row to be left out, "
                f"found one more, now because: {reasons[0]}"
            )

    def _accumulate(
        self,
        batch: StepBatch,
        part: Round,
        run: Callable[[Microbatch, Round], tuple[Tensor, Kept]],
        optimizer: Optimizer,
    ) -> tuple[Tensor, list[Kept]]:
        """Forward and backward of all microbatches. Out of memory: once more, from the start, with halved ones."""
        try:
            return _forward_backward(part, run)
        except torch.OutOfMemoryError as error:
            found = str(error).partition("\n")[0]
            if self.world.size > 1:
                # The others are in the collectives of this microbatch, layer by layer, and cannot be called out of them
                # to agree on smaller ones: all ranks end, each with this reason.
                why = _out_of_memory(self._max_tokens, found)
                self.world.announce(why)
                raise OutOfMemoryError(why) from error
            log.warning(
                "out of memory in microbatches of %d tokens (%s): halved for the rest of this run, trying again",
                self._max_tokens,
                found,
            )
        optimizer.forget()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self._max_tokens = max(1, self._max_tokens // 2)
        try:
            return _forward_backward(self._round(batch, part.sequences), run)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(_out_of_memory(self._max_tokens, str(error).partition("\n")[0])) from error

    def _finish(self, report: UpdateReport, optimizer: Optimizer, loss: Tensor) -> None:
        """The optimizer's step, or with guard.nonfinite = skip the reason why there was none; equal on all ranks."""
        total = float(self.world.sum(loss))
        try:
            report.grad_norms.append(optimizer.step(self.num_steps, total))
            report.losses.append(total)
        except NumericError as error:
            if self.config.guard.nonfinite == "stop":
                raise
            report.skipped.append(str(error))

    @contextmanager
    def _critic_at_home(self) -> Iterator[None]:
        """With offload_critic it is on the device inside the block only."""
        if not self.config.learner.offload_critic or self.critic is None:
            yield
            return
        self.critic.to(self.world.device)
        try:
            yield
        finally:
            self.critic.to("cpu")

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
            max_tokens=self._max_tokens,
            num_ranks=self.world.size,
            attention_cost=self._attention_cost,
        )
        return Round(
            sequences=tuple(part),
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

    def _logprobs(self, whole: Round) -> Tensor:
        """Log-probs of the whole step under the policy as it is."""
        temperature = self.config.sampling.temperature
        return self._everywhere(whole, lambda micro: self.policy(micro, temperature=temperature)[0], "log-probs")

    def _everywhere(self, whole: Round, function: Callable[[Microbatch], Tensor], what: str = "values") -> Tensor:
        """`function`, one number per response token, over the whole step and on every rank; no gradients."""
        with torch.no_grad():
            results = [(micro, function(micro).cpu()) for micro in whole.microbatches]
        filled_R = torch.zeros(whole.num_tokens, dtype=results[0][1].dtype)
        for micro, result_M in results:
            if micro.sequences:
                filled_R[micro.step_rows_M.cpu()] = result_M
        # Every row was filled by one rank and is 0 on the others: the sum is exact.
        return check_finite(self.world.sum(filled_R), what, self.num_steps).to(self.world.device)


def _forward_backward(
    part: Round, run: Callable[[Microbatch, Round], tuple[Tensor, Kept]]
) -> tuple[Tensor, list[Kept]]:
    total, kept = torch.zeros((), dtype=torch.float64), []
    for micro in part.microbatches:
        loss, made = run(micro, part)
        torch.autograd.backward(loss)
        total += loss.detach().cpu()
        kept.append(made)
    return total, kept


def _out_of_memory(max_tokens: int, found: str) -> str:
    return (
        f"expected a microbatch of {max_tokens} tokens to fit, found: {found}; lower learner.max_tokens, set "
        "learner.activation_checkpointing or learner.offload_optimizer, or use more ranks; the last checkpoint and the "
        "journal are whole, and the same command goes on from there"
    )


def _optimizer(name: str, module: torch.nn.Module, config: Config, lr: float) -> Optimizer:
    learner = config.learner
    return Optimizer(
        name,
        module,
        schedule=Schedule(lr, learner.warmup_steps, learner.lr_final, config.steps, learner.lr_schedule),
        betas=learner.adam_betas,
        weight_decay=learner.weight_decay,
        grad_clip=learner.grad_clip,
        offload=learner.offload_optimizer,
    )
