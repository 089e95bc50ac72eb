"""The learner's loop on rank 0. It reads as the algorithm; the other ranks do as they are told (`follower.py`).

consumes  B trajectories a step from `services.rollouts`   waits for  their arrival, bounded by the broker
produces  version v + 1 after step v, checkpoints, events   waits for  nothing, except the last evaluation, bounded
ends      after `steps` learner steps; on a signal (saved, exit 130); on an error (checkpoints untouched)

::

    take ─► begin ─► update policy ─► publish v+1 ─► update critic ─► audit ─► checkpoint when due ─► take ...
             values,                   │ the weights travel, and generators
             advantages                ▼ work on, while the critic trains

With `learner.publish_early` off a step publishes last: at S = 0 generators and learner then take turns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orz_async.config import Config
from orz_async.errors import DiskError, Interrupted, NumericError, PeerLostError
from orz_async.learner import checkpoint
from orz_async.learner.alarms import Alarms
from orz_async.learner.audit import Auditor
from orz_async.learner.evaluations import evaluation_fields, write_rows
from orz_async.learner.export import export
from orz_async.learner.follower import Command, encode_rollouts
from orz_async.learner.kept import keep, keeping
from orz_async.learner.lag_table import LagTable
from orz_async.learner.parallel import full_state
from orz_async.learner.report import step_fields
from orz_async.learner.sample import sampled_members, token_sample
from orz_async.learner.services import Services
from orz_async.learner.step import Step
from orz_async.learner.trainer import Trainer
from orz_async.observe.process import dump_stacks
from orz_async.records import Trajectory

log = logging.getLogger(__name__)


class Learner:
    """One run of the loop from wherever `trainer` stands."""

    def __init__(self, config: Config, trainer: Trainer, auditor: Auditor, services: Services) -> None:
        self.config = config
        self.trainer = trainer
        self.auditor = auditor
        self.services = services
        self._saved_step = -1 if trainer.num_steps == 0 else trainer.num_steps
        self._evaluating: list[int] = []
        self._reported: dict[str, float] = {}
        self._alarms = Alarms(config.guard, config.broker.max_lag)
        self._tightened = 0

    def run(self) -> None:
        """All steps that are left. Errors of the update itself are raised on every rank, and nobody is told; in any
        other case the others are between two messages, and are let go."""
        self.services.timeline.enter("other")
        self._reported = self.services.timeline.totals()
        try:
            with self.trainer.world.told():
                self.publish(self.trainer.num_steps)
                while self.trainer.num_steps < self.config.steps:
                    self.learn(self.take())
                    if self.trainer.num_steps % self.config.checkpoint.every == 0:
                        self.save()
                    self.collect_evaluations()
                self.finish()
        except Interrupted:
            self.save()
            self.trainer.world.send(Command.END)
            raise
        except (PeerLostError, DiskError) as error:
            dump_stacks(error)
            self.trainer.world.send(Command.END)
            raise
        self.trainer.world.send(Command.END)

    def take(self) -> list[Trajectory]:
        with (
            self.services.timeline.state("wait_rollouts"),
            self.trainer.world.keepalive(),
            self.services.stop.waiting(),
        ):
            return self.services.rollouts.take(self.trainer.num_steps)

    def learn(self, trajectories: list[Trajectory]) -> None:
        """One learner step; unless `publish_early` is off, its weights are on their way before the critic trains."""
        timeline, trainer = self.services.timeline, self.trainer
        if trainer.world.size > 1:
            trainer.world.send(Command.LEARN, encode_rollouts(trajectories))
        with keeping(self.services, trajectories, trainer.num_steps):
            with timeline.state("values"):
                step = trainer.begin(trajectories)
            with timeline.state("policy"):
                policy, table = trainer.update_policy(step)
            if self.config.learner.publish_early:
                self.publish(trainer.num_steps + 1)
            with timeline.state("critic"):
                critic = trainer.update_critic(step)
            trainer.conclude(policy, critic)
        with timeline.state("audit"):
            self.auditor.audit(step.batch, table)
        if reasons := [*policy.skipped, *critic.skipped]:
            keep(self.services, trajectories, step.batch.version, reasons[0])
        fields = step_fields(step, policy, table, critic)
        seconds = self._seconds()
        self.services.events.emit("step", **fields, seconds=seconds, step_s=sum(seconds.values()))
        self._keep_tokens(step, table)
        self.check_alarms(fields)
        self.check_mismatch(table)
        if not self.config.learner.publish_early:
            self.publish(trainer.num_steps)

    def _keep_tokens(self, step: Step, table: LagTable) -> None:
        sample = token_sample(step, table, sampled_members(self.config, step.batch))
        if sample is not None and self.services.tokens is not None:
            self.services.tokens.append(sample)

    def check_alarms(self, fields: Mapping[str, Any]) -> None:
        """Name what is alarming, and lower the staleness bound where an alarm is configured to."""
        for alarm in self._alarms.look(fields):
            self.services.events.emit(
                "alarm", step=fields["step"], name=alarm.name, found=alarm.found, limit=alarm.limit, words=alarm.words
            )
            log.warning("alarm %s in step %d: %s (limit %g)", alarm.name, fields["step"], alarm.words, alarm.limit)
        by = self._alarms.tightening(fields["version"])
        if by != self._tightened:
            self._tightened = by
            self.services.rollouts.tighten(by)
            lag = self.config.broker.max_lag - by
            self.services.events.emit("tighten", step=fields["step"], by=by, max_lag=lag)
            log.warning("the staleness bound is %d from here on, instead of %d", lag, self.config.broker.max_lag)

    def _seconds(self) -> dict[str, float]:
        """By state, since the last step was reported: what was waited for is part of a step."""
        before, self._reported = self._reported, self.services.timeline.totals()
        spent = {state: total - before.get(state, 0.0) for state, total in self._reported.items()}
        return {state: seconds for state, seconds in spent.items() if seconds > 0}

    def publish(self, version: int) -> None:
        """Offer the policy as it is. Outside of a step the other ranks are told to gather; inside they know."""
        services = self.services
        with services.timeline.state("publish"):
            if version == self.trainer.num_steps:
                self.trainer.world.send(Command.GATHER)
            named = full_state(self.trainer.policy, getattr(torch, self.config.model.dtype))
            if self.auditor.enabled:
                whole = list(named)
                self.auditor.remember(version, whole)
                named = iter(whole)
            report = services.weights.publish(version, named)
            services.events.emit("published", version=version, bytes=report.bytes, seconds=report.seconds)
            if self.evaluation_due(version):
                services.rollouts.evaluate(version)
                self._evaluating.append(version)
            services.rollouts.published(version, report.digest)

    def evaluation_due(self, version: int) -> bool:
        every = self.config.eval.every
        return bool(every and self.config.data.heldout) and (version % every == 0 or version == self.config.steps)

    def collect_evaluations(self) -> None:
        """Report the evaluations that are complete; those that are not never hold the loop."""
        for version in [v for v in self._evaluating if self.services.rollouts.evaluation_ready(v)]:
            self.report_evaluation(version, timeout_s=0.0)

    def report_evaluation(self, version: int, *, timeout_s: float) -> None:
        trajectories = self.services.rollouts.evaluation(version, timeout_s)
        self._evaluating.remove(version)
        if trajectories:
            write_rows(self.services.run_dir, version, trajectories)
            self.services.events.emit("eval", **evaluation_fields(version, trajectories))

    def save(self) -> None:
        """Nothing to do where the last checkpoint already stands at this step."""
        services, trainer = self.services, self.trainer
        if trainer.num_steps == self._saved_step:
            return
        with services.timeline.state("checkpoint"):
            before = services.timeline.totals().get("checkpoint", 0.0)
            trainer.world.send(Command.SAVE)
            ledger = services.rollouts.snapshot()
            path = checkpoint.save(trainer, run_dir=services.run_dir, identity=services.identity, ledger=ledger)
            services.rollouts.checkpointed(checkpoint.oldest_version(services.run_dir))
            self._saved_step = trainer.num_steps
            seconds = services.timeline.totals()["checkpoint"] - before
        services.events.emit("checkpoint", step=trainer.num_steps, path=path.name, seconds=seconds)

    def finish(self) -> None:
        """Save, export, and wait for the evaluations that are still under way."""
        services = self.services
        self.save()
        with services.timeline.state("export"):
            self.trainer.world.send(Command.EXPORT)
            export(self.trainer, source=Path(self.config.model.path), target=services.run_dir / "export")
        with services.timeline.state("wait_eval"), self.trainer.world.keepalive(), services.stop.waiting():
            for version in list(self._evaluating):
                self.report_evaluation(version, timeout_s=self.config.broker.wait_generators_s)

    def check_mismatch(self, table: LagTable) -> None:
        """Warn above one threshold, stop above the other. A difference that is not a number is above both."""
        worst, mean, k3, tokens = table.mismatch()
        warn, stop = self.config.learner.mismatch_warn, self.config.learner.mismatch_stop
        is_fatal = stop is not None and not worst <= stop
        if worst <= warn and not is_fatal:
            return
        found = (
            f"|learner - engine| log-prob up to {worst:.3g} "
            f"(mean {mean:.3g}, k3 {k3:.3g} over {tokens} tokens of equal weights)"
        )
        by_lag = table.mismatch_by_lag()
        self.services.events.emit("mismatch", max=worst, mean=mean, k3=k3, tokens=tokens, by_lag=by_lag)
        log.warning("expected at most %g, found %s; by lag: %s", warn, found, by_lag)
        if is_fatal:
            raise NumericError(
                f"expected engine and learner to compute the same model, found {found}, above learner.mismatch_stop = "
                f"{stop}; compare dtypes, attention and temperature of both sides"
            )
