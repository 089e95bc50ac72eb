"""The ledger's terms become leases: prompt, seed and sampling put in."""

from __future__ import annotations

from typing import Protocol

from orz_async.broker.transitions import LedgerConfig, Terms
from orz_async.config import Config
from orz_async.records import Kind, Lease, Prompt, Sampling

_MASK = (1 << 64) - 1


class PromptSource(Protocol):
    """An infinite order of prompts that depends on nothing but its seed."""

    def prompt(self, index: int) -> Prompt: ...


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters neighbouring numbers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def seed_of(run_seed: int, kind: Kind, rollout: int) -> int:
    """Seed of a rollout, in [0, 2**63). All attempts share it, so that a repeated attempt repeats the sample."""
    stream = {"train": 1, "eval": 2}[kind]
    state = _mix(run_seed + 0x9E3779B97F4A7C15 & _MASK)
    state = _mix(state + stream * 0x9E3779B97F4A7C15 & _MASK)
    return _mix(state + rollout * 0x9E3779B97F4A7C15 & _MASK) >> 1


def ledger_config(config: Config, num_heldout: int) -> LedgerConfig:
    evaluated = min(config.eval.prompts, num_heldout) * config.eval.samples if config.eval.every else 0
    return LedgerConfig(
        rollouts_per_step=config.broker.rollouts_per_step,
        samples_per_prompt=config.broker.samples_per_prompt,
        max_lag=config.broker.max_lag,
        window=config.broker.window,
        total_steps=config.steps,
        lease_s=config.broker.lease_s,
        heartbeat_s=config.broker.heartbeat_s,
        max_attempts=config.broker.max_attempts,
        overtime=config.broker.overtime,
        eval_rollouts=evaluated,
        eval_samples=config.eval.samples,
    )


class LeaseMaker:
    def __init__(self, config: Config, prompts: PromptSource, heldout: list[Prompt]) -> None:
        self.seed = config.seed
        self.prompts = prompts
        self.heldout = heldout
        longest = config.sampling.max_new_tokens
        self.sampling = {
            "train": Sampling(config.sampling.temperature, longest),
            "eval": Sampling(config.eval.temperature, longest),
        }

    def prompt_id(self, index: int) -> str:
        return self.prompts.prompt(index).prompt_id

    def lease(self, terms: Terms) -> Lease:
        prompt = self.heldout[terms.prompt] if terms.kind == "eval" else self.prompts.prompt(terms.prompt)
        return Lease(
            kind=terms.kind,
            rollout=terms.rollout,
            attempt=terms.attempt,
            prompt_id=prompt.prompt_id,
            prompt=prompt.tokens,
            answer=prompt.answer,
            sample=terms.sample,
            seed=seed_of(self.seed, terms.kind, terms.rollout),
            version_floor=terms.version_floor,
            sampling=self.sampling[terms.kind],
        )
