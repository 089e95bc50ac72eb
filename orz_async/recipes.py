"""Recipes: functions that return a complete `Config`, named for the hardware they were verified on."""

from __future__ import annotations

from collections.abc import Callable

from orz_async.config import (
    BrokerConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GeneratorConfig,
    LearnerConfig,
    ModelConfig,
    SamplingConfig,
)


def tiny_cpu() -> Config:
    """The demo: a 0.33 M-parameter model learns to write out its working, on two CPU cores in minutes."""
    return Config(
        run_dir="runs/tiny_cpu",
        steps=80,
        model=ModelConfig(path="runs/base/model"),
        data=DataConfig(train="runs/base/train.jsonl", heldout="runs/base/heldout.jsonl", max_prompt_tokens=64),
        sampling=SamplingConfig(max_new_tokens=96, stop=("</answer>",)),
        broker=BrokerConfig(prompts_per_step=32, samples_per_prompt=4, max_lag=1, lease_s=20.0),
        generator=GeneratorConfig(count=2, slots=64, queue=64),
        learner=LearnerConfig(
            lr=2e-4,
            critic_lr=1e-3,
            warmup_steps=0,
            # Near the end few rollouts are wrong: whitening makes their advantages large, and steps must be small.
            lr_final=0.1,
            critic_steps=4,
            max_tokens=2048,
            mismatch_warn=1e-5,
        ),
        eval=EvalConfig(every=10, prompts=200),
        checkpoint=CheckpointConfig(every=25),
    )


RECIPES: dict[str, Callable[[], Config]] = {"tiny_cpu": tiny_cpu}
