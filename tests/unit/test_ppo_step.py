"""One whole PPO step against an independent implementation: padded, float64, a loop over sequences and tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_kit as kit
import msgspec
import numpy as np
import pytest
import torch
import transformers
from learner_kit import exact_norms
from torch import Tensor

from orz_async.config import Config
from orz_async.errors import DataError, NumericError
from orz_async.learner.batch import pack_part, split
from orz_async.learner.report import CALIBRATION_EDGES, calibration
from orz_async.learner.sample import audited_members, sampled_members, token_sample
from orz_async.learner.trainer import Trainer
from orz_async.ops import backend
from orz_async.records import Span, Trajectory, as_float32, as_int32


class Oracle:
    """Everything again, from the equations: Hugging Face's own model on padded rows, Python loops, Adam by hand."""

    def __init__(self, config: Config, trainer: Trainer, batch: list[Trajectory]) -> None:
        self.config, self.batch, self.version = config, batch, trainer.num_steps
        base = transformers.AutoModelForCausalLM.from_pretrained(
            config.model.path, dtype=torch.float64, attn_implementation="sdpa"
        )
        self.policy = exact_norms(base.eval())
        self.critic = exact_norms(
            transformers.AutoModel.from_pretrained(config.model.path, dtype=torch.float64, attn_implementation="sdpa")
        ).eval()
        self.score = torch.nn.Linear(config_width(trainer), 1, dtype=torch.float64)
        if trainer.critic is not None:
            self.score.load_state_dict(trainer.critic.score.state_dict())
        self.critic_parameters = [*self.critic.parameters(), *self.score.parameters()]
        self.moments: dict[Tensor, tuple[Tensor, Tensor, int]] = {}

    def hidden(self, model: Any, members: list[int]) -> list[Tensor]:
        """For each sequence the rows that predict its response tokens."""
        inputs = [torch.from_numpy(np.concatenate([as_int32(t.prompt), as_int32(t.response)])) for t in self.batch]
        longest = max(len(inputs[b]) for b in members)
        tokens_BT = torch.stack([torch.nn.functional.pad(inputs[b], (0, longest - len(inputs[b]))) for b in members])
        mask_BT = torch.stack([torch.arange(longest) < len(inputs[b]) for b in members])
        hidden_BTD = model(tokens_BT.long(), attention_mask=mask_BT, use_cache=False).last_hidden_state
        found = []
        for row, b in enumerate(members):
            start = self.batch[b].num_prompt_tokens - 1
            found.append(hidden_BTD[row, start : start + self.batch[b].num_response_tokens])
        return found

    def logprobs(self, members: list[int]) -> list[Tensor]:
        temperature = self.config.sampling.temperature
        found = []
        for b, hidden_TD in zip(members, self.hidden(self.policy.model, members), strict=True):
            logits_TV = self.policy.lm_head(hidden_TD) / temperature
            targets_T = torch.from_numpy(as_int32(self.batch[b].response).astype(np.int64))
            found.append(torch.log_softmax(logits_TV, -1).gather(1, targets_T[:, None]).squeeze(1))
        return found

    def values(self, members: list[int]) -> list[Tensor]:
        return [self.score(hidden_TD).squeeze(1) for hidden_TD in self.hidden(self.critic, members)]

    def begin(self) -> None:
        everyone = list(range(len(self.batch)))
        gamma, lam = self.config.learner.gamma, self.config.learner.lam
        with torch.no_grad():
            self.old_values = self.values(everyone)
            self.start_logprobs = self.logprobs(everyone)
        self.advantages, self.returns = [], []
        for b in everyone:
            values = self.old_values[b].tolist()
            advantages, following = [0.0] * len(values), 0.0
            for t in reversed(range(len(values))):
                last = t == len(values) - 1
                reward = self.batch[b].reward if last else 0.0
                delta = reward + (0.0 if last else gamma * values[t + 1]) - values[t]
                following = delta + (0.0 if last else gamma * lam * following)
                advantages[t] = following
            self.advantages.append(torch.tensor(advantages, dtype=torch.float64))
            self.returns.append(self.advantages[-1] + self.old_values[b])
        if self.config.learner.estimator != "gae":
            self.old_values = [torch.zeros_like(v) for v in self.old_values]
            self.returns = [torch.full_like(v, self.batch[b].reward) for b, v in enumerate(self.old_values)]
            self.advantages = [self.outcome(b).expand_as(v) for b, v in enumerate(self.old_values)]
        if self.config.learner.estimator != "grpo":
            flat = torch.cat(self.advantages)
            mean, variance = flat.mean(), flat.var(correction=0)
            self.advantages = [(a - mean) / torch.sqrt(variance + 1e-8) for a in self.advantages]

    def outcome(self, b: int) -> Tensor:
        rewards = [t.reward for t in self.batch]
        if self.config.learner.estimator == "reinforce":
            return torch.tensor(rewards[b] - sum(rewards) / len(rewards), dtype=torch.float64)
        group = [t.reward for t in self.batch if t.prompt_id == self.batch[b].prompt_id]
        mean = sum(group) / len(group)
        spread = (sum((r - mean) ** 2 for r in group) / len(group)) ** 0.5
        return torch.tensor((rewards[b] - mean) / (spread + 1e-6), dtype=torch.float64)

    def kept(self, b: int) -> Tensor:
        """0 or 1 a token: does it take part?"""
        learner = self.config.learner
        sampled_T = torch.from_numpy(as_float32(self.batch[b].logprobs).astype(np.float64))
        apart_T = (self.start_logprobs[b] - sampled_T).abs()
        if learner.mismatch_mask == "sequence":
            apart_T = (self.start_logprobs[b] - sampled_T).mean().abs().expand_as(sampled_T)
        if learner.mismatch_mask == "none":
            return torch.ones_like(sampled_T)
        return (apart_T <= np.log(learner.mismatch_mask_above)).double()

    def proximal(self, b: int, current_T: Tensor, sampled_T: Tensor) -> Tensor:
        learner = self.config.learner
        if learner.objective == "ppo":
            return sampled_T
        if learner.proximal == "recomputed":
            return self.start_logprobs[b]
        lags = [self.version - int(v) for v in self.batch[b].versions()]
        share_T = torch.tensor([1 / lag if lag else 0.0 for lag in lags], dtype=torch.float64)
        return share_T * sampled_T + (1 - share_T) * current_T.detach()

    def weights(self, members: list[int], packs: list[list[int]]) -> dict[int, float]:
        """What a token of each sequence counts in the loss."""
        lengths = {b: self.batch[b].num_response_tokens for b in members}
        match self.config.learner.loss_aggregation:
            case "token":
                return {b: 1 / sum(lengths.values()) for b in members}
            case "sequence":
                return {b: 1 / (lengths[b] * len(members)) for b in members}
            case "pack":
                return {b: 1 / (sum(lengths[c] for c in pack) * len(packs)) for pack in packs for b in pack}

    def policy_loss(self, members: list[int], packs: list[list[int]]) -> Tensor:
        learner, weight = self.config.learner, self.weights(members, packs)
        total = torch.zeros((), dtype=torch.float64)
        for b, current_T in zip(members, self.logprobs(members), strict=True):
            sampled_T = torch.from_numpy(as_float32(self.batch[b].logprobs).astype(np.float64))
            proximal_T = self.proximal(b, current_T, sampled_T)
            behaviour_T = torch.exp(proximal_T - sampled_T)
            if learner.behaviour_cap is not None and learner.objective == "decoupled":
                behaviour_T = behaviour_T.clamp(max=learner.behaviour_cap)
            ratio_T = torch.exp(current_T - proximal_T)
            clipped_T = ratio_T.clamp(1 - learner.clip_low, 1 + learner.clip_high)
            gain_T = torch.minimum(ratio_T * self.advantages[b], clipped_T * self.advantages[b])
            if learner.dual_clip is not None:
                floor_T = learner.dual_clip * self.advantages[b]
                gain_T = torch.where(self.advantages[b] < 0, torch.maximum(gain_T, floor_T), gain_T)
            total = total - (self.kept(b) * behaviour_T * gain_T).sum() * weight[b]
        return total

    def critic_loss(self, members: list[int], packs: list[list[int]]) -> Tensor:
        clip, weight = self.config.learner.value_clip, self.weights(members, packs)
        total = torch.zeros((), dtype=torch.float64)
        for b, values_T in zip(members, self.values(members), strict=True):
            worst_T = (values_T - self.returns[b]) ** 2
            if clip is not None:
                near_T = self.old_values[b] + (values_T - self.old_values[b]).clamp(-clip, clip)
                worst_T = torch.maximum(worst_T, (near_T - self.returns[b]) ** 2)
            total = total + 0.5 * worst_T.sum() * weight[b]
        return total

    def update(self, loss: Tensor, parameters: list[Tensor], lr: float) -> tuple[float, float]:
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        scale = min(1.0, self.config.learner.grad_clip / (norm.item() + 1e-6))
        beta1, beta2 = self.config.learner.adam_betas
        for parameter, grad in zip(parameters, grads, strict=True):
            zero = torch.zeros_like(parameter)
            first, second, count = self.moments.get(parameter, (zero, zero, 0))
            count += 1
            first = beta1 * first + (1 - beta1) * grad * scale
            second = beta2 * second + (1 - beta2) * (grad * scale) ** 2
            self.moments[parameter] = (first, second, count)
            step = (first / (1 - beta1**count)) / (torch.sqrt(second / (1 - beta2**count)) + 1e-8)
            with torch.no_grad():
                parameter.mul_(1 - lr * self.config.learner.weight_decay).sub_(lr * step)
        return loss.item(), norm.item()


def policy_lr(config: Config) -> float:
    """lr_final is 1 here, unless the schedule is a cosine: then the formula of SGDR, arXiv:1608.03983 eq. 5."""
    learner = config.learner
    if learner.lr_schedule != "cosine":
        return learner.lr
    low = learner.lr * learner.lr_final
    return low + (learner.lr - low) * (1 + np.cos(np.pi * STALE / config.steps)) / 2


def config_width(trainer: Trainer) -> int:
    return int(trainer.policy.config.hidden_size)


STALE = 5
"""The learner stands here, and the oldest of the rollouts is from version 2."""

VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {"objective": "ppo", "clip_low": 0.2, "clip_high": 0.3},
    "ppo, three policy steps": {"policy_steps": 3, "critic_steps": 4, "lr": 0.05},
    "decoupled": {"objective": "decoupled", "behaviour_cap": 2.0},
    "decoupled, two policy steps": {"objective": "decoupled", "policy_steps": 2, "behaviour_cap": 5.0, "lr": 0.05},
    "dual clip, no value clip": {"dual_clip": 1.5, "value_clip": None, "weight_decay": 0.1},
    "mean over sequences": {"loss_aggregation": "sequence", "gamma": 0.9, "lam": 0.7},
    "mean over packs": {"loss_aggregation": "pack", "max_tokens": 40},
    "interpolated": {"objective": "decoupled", "proximal": "interpolated", "behaviour_cap": 2.0},
    "interpolated, two steps": {"objective": "decoupled", "proximal": "interpolated", "policy_steps": 2, "lr": 0.05},
    "token mask": {"mismatch_mask": "token", "mismatch_mask_above": 1.3},
    "sequence mask, decoupled": {
        "objective": "decoupled",
        "mismatch_mask": "sequence",
        "mismatch_mask_above": 1.1,
        "policy_steps": 2,
        "lr": 0.05,
    },
    "grpo": {"estimator": "grpo"},
    "reinforce": {"estimator": "reinforce", "lr_schedule": "cosine", "lr_final": 0.1},
    "activation checkpointing": {"activation_checkpointing": True, "offload_critic": True, "offload_optimizer": True},
    "tight gradient clip": {"grad_clip": 0.01, "value_clip": 0.01, "critic_steps": 3, "critic_lr": 0.05},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.save_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_float64_oracle(model_path: Path, variant: str) -> None:
    config = kit.config(model_path, learner=VARIANTS[variant], broker={"max_lag": 3}, steps=20)
    batch = near_policy(config, kit.rollouts(9, seed=3), version=STALE)
    trainer = kit.trainer(config, dtype=torch.float64)
    trainer.num_steps = STALE
    for module in (trainer.policy, trainer.critic):
        exact_norms(module) if module is not None else None
    oracle = Oracle(config, trainer, batch)

    step = trainer.begin(batch)
    oracle.begin()
    close(step.values_R, torch.cat(oracle.old_values))
    close(step.returns_R, torch.cat(oracle.returns))
    close(step.advantages_R, torch.cat(oracle.advantages))

    report, _ = trainer.update_policy(step)
    for k, part in enumerate(split(step.batch, config.learner.policy_steps, seed=(config.seed, STALE, 1))):
        want = oracle.update(
            oracle.policy_loss(part, packs(trainer, step, part)), list(oracle.policy.parameters()), policy_lr(config)
        )
        close(torch.tensor([report.losses[k], report.grad_norms[k]]), torch.tensor(want))
    for (name, got), expected in zip(trainer.policy.named_parameters(), oracle.policy.parameters(), strict=True):
        close(got, expected, name)

    critic_report = trainer.update_critic(step)
    assert trainer.num_steps == STALE + 1
    if trainer.critic is None:
        assert not critic_report.losses
        return
    for k, part in enumerate(split(step.batch, config.learner.critic_steps, seed=(config.seed, STALE, 2))):
        loss = oracle.critic_loss(part, packs(trainer, step, part))
        want = oracle.update(loss, oracle.critic_parameters, config.learner.critic_lr)
        close(torch.tensor([critic_report.losses[k], critic_report.grad_norms[k]]), torch.tensor(want))
    for (name, got), expected in zip(trainer.critic.named_parameters(), oracle.critic_parameters, strict=True):
        close(got, expected, name)
    assert len(report.losses) == config.learner.policy_steps
    assert len(critic_report.losses) == config.learner.critic_steps


def test_clips_act_on_both_sides_in_these_cases(model_path: Path) -> None:
    """Otherwise the comparison above would not have tested them."""
    config = kit.config(model_path, learner=VARIANTS["dual clip, no value clip"])
    trainer = kit.trainer(config)
    report, _ = trainer.update_policy(trainer.begin(near_policy(config, kit.rollouts(9, seed=3))))
    assert report.stats["clip_low"] > 0.05
    assert report.stats["clip_high"] > 0.05
    assert report.stats["clip_dual"] > 0.02
    config = kit.config(model_path, learner=VARIANTS["tight gradient clip"])
    trainer = kit.trainer(config)
    step = trainer.begin(near_policy(config, kit.rollouts(9, seed=3)))
    trainer.update_policy(step)
    assert trainer.update_critic(step).stats["clipped"] > 0.05


@pytest.mark.parametrize("variant", ["ppo", "decoupled", "mean over sequences"])
def test_float32_step_is_close_to_float64(model_path: Path, variant: str) -> None:
    """What is trained in practice: losses to 1e-6, gradients (read back from Adam's first moment) to 1e-5."""
    config = kit.config(model_path, learner=VARIANTS[variant] | {"critic_steps": 1})
    batch = near_policy(config, kit.rollouts(9, seed=3))
    found = []
    for dtype in (torch.float32, torch.float64):
        trainer = kit.trainer(config, dtype=dtype)
        step = trainer.begin(batch)
        policy, _ = trainer.update_policy(step)
        critic = trainer.update_critic(step)
        moments = [
            torch.cat([m.flatten().double() for name, m in optimizer.state() if name.startswith("exp_avg.")])
            for optimizer in (trainer.policy_optimizer, trainer.critic_optimizer)
        ]
        found.append((torch.tensor(policy.losses + critic.losses, dtype=torch.float64), *moments))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)


def own_logprobs(config: Config, batch: list[Trajectory]) -> list[Trajectory]:
    """The same rollouts as if the policy itself had sampled them."""
    trainer = kit.trainer(config)
    step = trainer.begin(batch)
    logprobs_R = trainer._logprobs(step.whole).numpy()
    return [
        kit.with_sampled(t, logprobs_R[low:high])
        for t, low, high in zip(batch, step.batch.cu_responses_B1, step.batch.cu_responses_B1[1:], strict=False)
    ]


def near_policy(config: Config, batch: list[Trajectory], *, version: int = 0) -> list[Trajectory]:
    """As if a policy not far away had sampled: ratios between 1/2 and 2, on both sides of the clip range.

    At version 3 and above lags are 0 to 3, and every third rollout has a token from each of two versions.
    """
    rng = np.random.default_rng(11)
    near = []
    for n, t in enumerate(own_logprobs(config, batch)):
        noise = rng.normal(0, 0.4, t.num_response_tokens)
        t = kit.with_sampled(t, np.minimum(as_float32(t.logprobs) + noise, 0.0))
        if version:
            spans = [Span(version - n % 4, 0)]
            if n % 3 == 2 and t.num_response_tokens > 1:
                spans = [Span(version - 3, 0), Span(version - n % 2, t.num_response_tokens // 2)]
            t = msgspec.structs.replace(t, spans=tuple(spans))
        near.append(t)
    return near


@pytest.mark.parametrize("proximal", ["recomputed", "interpolated"])
@pytest.mark.parametrize("objective", ["ppo", "decoupled"])
def test_ratio_is_exactly_one_without_lag(model_path: Path, objective: str, proximal: str) -> None:
    config = kit.config(model_path, learner={"objective": objective, "proximal": proximal})
    batch = own_logprobs(config, kit.rollouts(9, seed=3))
    trainer = kit.trainer(config)
    report, table = trainer.update_policy(trainer.begin(batch))
    assert (report.stats["ratio_min"], report.stats["ratio_mean"], report.stats["ratio_max"]) == (1.0, 1.0, 1.0)
    assert report.stats["clip_low"] == report.stats["clip_high"] == report.stats["kl_k3"] == 0.0
    assert table.mismatch() == (0.0, 0.0, 0.0, sum(t.num_response_tokens for t in batch))


def test_masks_leave_some_out_and_keep_some(model_path: Path) -> None:
    """Otherwise the comparison above would not have tested them."""
    for variant in ("token mask", "sequence mask, decoupled"):
        config = kit.config(model_path, learner=VARIANTS[variant], broker={"max_lag": 3})
        trainer = kit.trainer(config)
        trainer.num_steps = STALE
        report, table = trainer.update_policy(
            trainer.begin(near_policy(config, kit.rollouts(9, seed=3), version=STALE))
        )
        assert 0.1 < report.stats["masked"] < 0.9, variant
        assert set(table.histogram) == {"0", "1", "2", "3"}
        if config.learner.policy_steps == 1:
            # Masked tokens are in the table as they are: a log-prob of 0 would make their ratio large.
            assert all(0.5 < row["ratio"] < 2 for row in table.means().values())


def test_policy_is_frozen_while_the_critic_warms_up(model_path: Path) -> None:
    config = kit.config(model_path, learner={"critic_warmup_steps": 2})
    trainer = kit.trainer(config)
    assert trainer.critic is not None
    before, values = [p.detach().clone() for p in trainer.policy.parameters()], trainer.critic.score.weight.clone()
    for version in range(3):
        step = trainer.begin(kit.rollouts(9, seed=version, version=version))
        report, _ = trainer.update_policy(step)
        trainer.update_critic(step)
        moved = any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
        assert (moved, bool(report.losses), report.lr > 0) == ((version == 2,) * 3)
    assert not torch.equal(values, trainer.critic.score.weight)
    assert trainer.num_steps == 3


def test_equal_seeds_equal_bits(model_path: Path) -> None:
    config = kit.config(model_path, learner={"policy_steps": 2, "critic_steps": 3})
    states = []
    for _ in range(2):
        trainer = kit.trainer(config)
        for version in range(3):
            step = trainer.begin(kit.rollouts(9, seed=version, version=version, max_lag=1))
            trainer.update_policy(step)
            trainer.update_critic(step)
        states.append([p.detach().clone() for m in (trainer.policy, trainer.critic) for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_equal_seeds_equal_losses_whatever_computes(model_path: Path) -> None:
    """By two backends the same within float32, and by each one bit for bit."""
    config = kit.config(model_path, learner={"policy_steps": 2, "critic_steps": 2})

    def losses(name: str) -> list[float]:
        with backend.using(name):
            trainer = kit.trainer(config)
            step = trainer.begin(kit.rollouts(9, seed=3))
            policy, _ = trainer.update_policy(step)
            return [*policy.losses, *trainer.update_critic(step).losses]

    reference, cpp = losses("reference"), losses("cpu")
    assert reference == losses("reference") and cpp == losses("cpu")
    assert cpp == pytest.approx(reference, rel=1e-5, abs=1e-6)


def test_stale_rollouts_raise(model_path: Path) -> None:
    trainer = kit.trainer(kit.config(model_path))
    trainer.num_steps = 3
    with pytest.raises(DataError, match="versions 2 to 3"):
        trainer.begin(kit.rollouts(6, version=1))
    with pytest.raises(DataError, match="found 4 to 4"):
        trainer.begin(kit.rollouts(6, version=4))


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_infinite_loss_stops_before_the_optimizer(model_path: Path, part: str) -> None:
    config = kit.config(model_path)
    trainer = kit.trainer(config)
    batch = kit.rollouts(6)
    step = trainer.begin(batch)
    module = getattr(trainer, part)
    with torch.no_grad():
        dict(module.named_parameters())["model.norm.weight"][3] = float("nan")
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(NumericError, match="learner step 0"):
        trainer.update_policy(step) if part == "policy" else trainer.update_critic(step)
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(before, module.parameters(), strict=True))


def packs(trainer: Trainer, step: Any, part: list[int]) -> list[list[int]]:
    [bins] = pack_part(
        step.batch,
        part,
        max_tokens=trainer.config.learner.max_tokens,
        num_ranks=1,
        attention_cost=trainer._attention_cost,
    )
    return bins


def close(got: Tensor, want: Tensor, name: str = "") -> None:
    torch.testing.assert_close(
        got.detach().double(), want.detach().double(), atol=1e-6, rtol=1e-6, msg=lambda text: f"{name}: {text}"
    )


def with_sample(config: Config, **settings: int) -> Config:
    return replace(config, observe=replace(config.observe, **settings))


def test_the_token_sample_is_what_the_step_computed(model_path: Path) -> None:
    config = with_sample(kit.config(model_path), sample_rollouts=4)
    trainer = kit.trainer(config)
    step = trainer.begin(near_policy(config, kit.rollouts(9, seed=3)))
    _, table = trainer.update_policy(step)
    sample = token_sample(step, table, sampled_members(config, step.batch))
    assert sample is not None
    numbers = [t.rollout for t in step.batch.trajectories]
    assert len(list(sample.columns())) == 4
    for rollout, columns in sample.columns():
        b = numbers.index(rollout)
        rows = slice(step.batch.cu_responses_B1[b], step.batch.cu_responses_B1[b + 1])
        np.testing.assert_array_equal(columns["values"], step.values_R[rows])
        np.testing.assert_array_equal(columns["advantages"], step.advantages_R[rows])
        np.testing.assert_array_equal(columns["gaps"], columns["log_ratios"])  # lag 0: equal weights
    for budget in (1, 12, 40):
        few = sampled_members(with_sample(config, sample_rollouts=9, sample_tokens=budget), step.batch)
        assert few and (sum(step.batch.response_lengths_B[few]) <= budget or len(few) == 1)
    assert set(audited_members(config, step.batch)) <= set(sampled_members(config, step.batch))
    assert token_sample(step, table, sampled_members(with_sample(config, sample_rollouts=0), step.batch)) is None


def test_calibration_counts_every_token_once(model_path: Path) -> None:
    config = kit.config(model_path)
    step = kit.trainer(config).begin(kit.rollouts(9, seed=3))
    bins = calibration(step)
    assert sum(bins["tokens"]) == step.batch.num_response_tokens
    assert sum(bins["values"]) == pytest.approx(float(step.values_R.double().sum()))
    assert sum(bins["returns"]) == pytest.approx(float(step.returns_R.double().sum()))
    for index in range(1, len(CALIBRATION_EDGES)):
        if count := bins["tokens"][index]:
            assert CALIBRATION_EDGES[index - 1] <= bins["values"][index] / count < CALIBRATION_EDGES[index]
