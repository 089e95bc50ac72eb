"""One learner step of the demo's shape on one core, against the bare arithmetic and against a padded loop.

All train on the same 128 rollouts (32 prompts of 18 tokens, four samples of each, responses of 8 to 96 tokens, 30 on
average): critic values, advantages, one policy and four critic updates.

    learner          Trainer: begin, update_policy, update_critic
    bare arithmetic  forward, backward and AdamW of the very same microbatches, nothing else: what is left is overhead
    padded           the usual loop: right-padded batches of 32 sequences, full logits, transformers' own attention
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.engines import demo_shape
from benchmarks.protocol import Row, interleave
from orz_async.config import BrokerConfig, Config, LearnerConfig
from orz_async.learner import attention
from orz_async.learner.batch import split
from orz_async.learner.model import Policy, build_critic
from orz_async.learner.parallel import World
from orz_async.learner.trainer import Trainer
from orz_async.records import Span, Trajectory, as_int32, float32_bytes, int32_bytes

PROMPTS, SAMPLES, PROMPT, LONGEST = 32, 4, 18, 96


def config() -> Config:
    return Config(
        broker=BrokerConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, max_lag=1000),
        learner=LearnerConfig(lr=2e-4, critic_lr=1e-3, warmup_steps=0, critic_steps=4, max_tokens=2048),
    )


def rollouts(vocab: int) -> list[Trajectory]:
    random = np.random.default_rng(0)
    prompts = [int32_bytes(random.integers(1, vocab, PROMPT)) for _ in range(PROMPTS)]
    made = []
    for n in range(PROMPTS * SAMPLES):
        length = min(8 + int(random.geometric(1 / 22)), LONGEST)
        made.append(
            Trajectory(
                kind="train",
                rollout=n,
                attempt=0,
                prompt_id=str(n // SAMPLES),
                sample=n % SAMPLES,
                prompt=prompts[n // SAMPLES],
                response=int32_bytes(random.integers(1, vocab, length)),
                logprobs=float32_bytes(-random.uniform(2, 5, length)),
                spans=(Span(0, 0),),
                reward=float(random.integers(0, 2)),
                finish="stop",
                verdict="correct",
                generator="",
                generate_s=0.0,
            )
        )
    return made


def trainer() -> Trainer:
    causal_lm = demo_shape()
    causal_lm.set_attn_implementation(attention.NAME)
    policy = Policy(causal_lm)
    return Trainer(config(), policy, build_critic(policy, seed=0), World.single())


def learner(batch: list[Trajectory]) -> Callable[[], None]:
    engine = trainer()

    def step() -> None:
        started = engine.begin(batch)
        engine.update_policy(started)
        engine.update_critic(started)

    return step


def bare(batch: list[Trajectory]) -> Callable[[], None]:
    engine = trainer()
    critic = engine.critic
    assert critic is not None
    started = engine.begin(batch)
    whole = started.whole.microbatches
    parts = [engine._round(started.batch, part).microbatches for part in split(started.batch, 4, seed=(0, 0, 2))]
    policy_adam = torch.optim.AdamW(engine.policy.parameters(), lr=2e-4, fused=True)
    critic_adam = torch.optim.AdamW(critic.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        with torch.no_grad():
            for micro in whole:
                critic(micro)
        for micro in whole:
            logprobs_M, _ = engine.policy(micro, temperature=1.0)
            torch.autograd.backward(logprobs_M.mean())
        policy_adam.step()
        policy_adam.zero_grad()
        for part in parts:
            for micro in part:
                torch.autograd.backward(critic(micro).square().mean())
            critic_adam.step()
            critic_adam.zero_grad()

    return step


def padded(batch: list[Trajectory]) -> Callable[[], None]:
    model = demo_shape()
    model.set_attn_implementation("sdpa")
    critic, score = copy.deepcopy(model.model), torch.nn.Linear(128, 1)
    policy_adam = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    critic_adam = torch.optim.AdamW([*critic.parameters(), *score.parameters()], lr=1e-3, fused=True)
    pieces = [_pad(batch[start : start + 32]) for start in range(0, len(batch), 32)]

    def values(piece: dict[str, Tensor]) -> Any:
        hidden = critic(piece["tokens"], attention_mask=piece["attention"], use_cache=False).last_hidden_state
        return score(hidden[:, :-1]).squeeze(2)

    def step() -> None:
        with torch.no_grad():
            advantages = [piece["reward"][:, None] - values(piece) for piece in pieces]
        for piece, advantage in zip(pieces, advantages, strict=True):
            output = model(piece["tokens"], attention_mask=piece["attention"], use_cache=False)
            logprobs = torch.log_softmax(output.logits[:, :-1].float(), -1)
            current = logprobs.gather(2, piece["tokens"][:, 1:, None]).squeeze(2)
            ratio = torch.exp(current - piece["sampled"])
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            torch.autograd.backward(-(gain * piece["response"]).sum() / 4000)
        policy_adam.step()
        policy_adam.zero_grad()
        for piece in pieces:
            error = (values(piece) - piece["reward"][:, None]) * piece["response"]
            torch.autograd.backward(error.square().sum() / 1000)
            critic_adam.step()
            critic_adam.zero_grad()

    return step


def _pad(rows: list[Trajectory]) -> dict[str, Tensor]:
    tokens = [
        torch.from_numpy(np.concatenate([as_int32(t.prompt), as_int32(t.response)]).astype(np.int64)) for t in rows
    ]
    longest = max(map(len, tokens))
    at = torch.arange(longest - 1)
    ends = torch.tensor([[len(t) - 1] for t in tokens])
    response = (at >= PROMPT - 1) & (at < ends)
    return {
        "tokens": torch.stack([pad(t, (0, longest - len(t))) for t in tokens]),
        "attention": torch.arange(longest) <= ends,
        "response": response.float(),
        "sampled": torch.full((len(rows), longest - 1), -3.0),
        "reward": torch.tensor([t.reward for t in rows]),
    }


def run() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batch = rollouts(demo_shape().config.vocab_size)
        tokens = sum(t.num_response_tokens for t in batch)
        variants = {"learner": learner(batch), "bare arithmetic": bare(batch), "padded": padded(batch)}
        rows = interleave("learner_step 128 rollouts", variants)
        for made in rows:
            made["notes"] |= {"response_tokens": tokens, "threads": 1}
        return rows
    finally:
        torch.set_num_threads(threads)
