"""Recipes: functions that return a complete `Config`, named for the hardware they are for.

`tiny_cpu` runs in the tests, `small_1gpu` runs there cut down to a CPU. The ORZ recipes have the published settings;
they have been planned (`--dry-run`). No GPU has run any of them yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def small_1gpu() -> Config:
    """A 50 M-parameter base learns to write out its working on a harder mix of tasks; learner and generator share one
    GPU. Meant to take at most 8 minutes on an H200, base included; no GPU has run it yet."""
    base = "runs/base-small"
    return Config(
        run_dir="runs/small_1gpu",
        steps=60,
        model=ModelConfig(path=f"{base}/model", dtype="bfloat16"),
        data=DataConfig(train=f"{base}/train.jsonl", heldout=f"{base}/heldout.jsonl", max_prompt_tokens=64),
        sampling=SamplingConfig(max_new_tokens=160, stop=("</answer>",)),
        broker=BrokerConfig(prompts_per_step=64, samples_per_prompt=16, max_lag=1),
        generator=GeneratorConfig(count=1, slots=512, queue=256, device="cuda:0", verifiers=2),
        learner=LearnerConfig(
            lr=3e-5,
            critic_lr=1e-4,
            warmup_steps=3,
            lr_final=0.1,
            critic_steps=4,
            max_tokens=32_768,
            # bfloat16 on both sides, by different kernels: single tokens of low probability differ by tenths.
            mismatch_warn=0.5,
        ),
        eval=EvalConfig(every=10, prompts=500),
        checkpoint=CheckpointConfig(every=30),
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a recipe runs: GPUs of the learner (its ranks) and of the generators (one daemon each, or a group)."""

    learner_gpus: int
    generator_gpus: int
    gpus_per_node: int = 8

    @property
    def nodes(self) -> int:
        return -(-(self.learner_gpus + self.generator_gpus) // self.gpus_per_node)


def _orz(name: str, model: str, layout: Layout, *, steps: int, tensor_parallel: int = 1, **learner: Any) -> Config:
    """What all Open-Reasoner-Zero runs share (arXiv:2503.24290 and its released configuration): 128 prompts with 64
    samples, one policy and twelve critic updates, gamma = lambda = 1, no KL, AdamW at 1e-6 and 5e-6 after 50 steps."""
    settings: dict[str, Any] = {"max_tokens": 16384, "activation_checkpointing": True, "threads": 4}
    return Config(
        run_dir=f"runs/{name}",
        steps=steps,
        model=ModelConfig(path=f"models/{model}", dtype="bfloat16"),
        data=DataConfig(train="data/orz_math_57k_collected.json", heldout="data/math500.json", template="orz"),
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=8000),
        # Steps take minutes here: a lease without progress for two of them is lost.
        broker=BrokerConfig(prompts_per_step=128, samples_per_prompt=64, max_lag=1, lease_s=120.0, heartbeat_s=2.0),
        generator=GeneratorConfig(
            engine="vllm", count=layout.generator_gpus // tensor_parallel, slots=128, queue=64, verifiers=4
        ),
        learner=LearnerConfig(
            lr=1e-6,
            critic_lr=5e-6,
            warmup_steps=50,
            policy_steps=1,
            critic_steps=12,
            clip_low=0.2,
            clip_high=0.2,
            adam_betas=(0.9, 0.95),
            weight_decay=0.0,
            grad_clip=1.0,
            **(settings | learner),
        ),
        eval=EvalConfig(every=10, prompts=500, samples=1),
        checkpoint=CheckpointConfig(every=10),
    )


def orz_0_5b_1gpu() -> Config:
    """ORZ-0.5B on one GPU that learner and generator share."""
    return _orz("orz_0_5b_1gpu", "Qwen2.5-0.5B", LAYOUTS["orz_0_5b_1gpu"], steps=200)


def orz_1_5b_8gpu() -> Config:
    """ORZ-1.5B on one node: 3 GPUs learn, 5 generate."""
    return _orz("orz_1_5b_8gpu", "Qwen2.5-1.5B", LAYOUTS["orz_1_5b_8gpu"], steps=150)


def orz_7b_8gpu() -> Config:
    """ORZ-7B on one node: 4 GPUs learn, with the optimizer in host memory, 4 generate."""
    return _orz("orz_7b_8gpu", "Qwen2.5-7B", LAYOUTS["orz_7b_8gpu"], steps=650, offload_optimizer=True)


def orz_7b_64gpu() -> Config:
    """ORZ-7B on 8 nodes: 24 GPUs learn, three copies of the weights over 8 each, 40 generate."""
    return _orz("orz_7b_64gpu", "Qwen2.5-7B", LAYOUTS["orz_7b_64gpu"], steps=650, shard_ranks=8)


def orz_32b_128gpu() -> Config:
    """ORZ-32B on 16 nodes: 64 GPUs learn, 64 generate, four GPUs an engine."""
    return _orz("orz_32b_128gpu", "Qwen2.5-32B", LAYOUTS["orz_32b_128gpu"], steps=1200, tensor_parallel=4)


BASES: dict[str, str] = {"tiny_cpu": "tiny", "small_1gpu": "small"}
"""Recipes that make their own base model: the name of its plan in `learner.base_plan`."""

LAYOUTS: dict[str, Layout] = {
    "small_1gpu": Layout(1, 1, gpus_per_node=1),
    "orz_0_5b_1gpu": Layout(1, 1, gpus_per_node=1),
    "orz_1_5b_8gpu": Layout(3, 5),
    "orz_7b_8gpu": Layout(4, 4),
    "orz_7b_64gpu": Layout(24, 40),
    "orz_32b_128gpu": Layout(64, 64),
}
"""By recipe; a recipe that is not here runs on CPU, one rank."""

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (tiny_cpu, small_1gpu, orz_0_5b_1gpu, orz_1_5b_8gpu, orz_7b_8gpu, orz_7b_64gpu, orz_32b_128gpu)
}
