"""Memory by part against what is really held: parameter counts, autograd's saved tensors, the peak of a whole step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import learner_kit as kit
import msgspec
import numpy as np
import pytest
import torch
import transformers

from orz_async.config import Config, DataConfig, LearnerConfig, ModelConfig, SamplingConfig
from orz_async.launcher.commands import dry_run
from orz_async.learner import model as model_module
from orz_async.learner.memory import QWEN25, Shape, activation_bytes, learner_peak, learner_phases
from orz_async.learner.model import build_critic, load_policy
from orz_async.learner.optim import Optimizer
from orz_async.learner.parallel import World
from orz_async.learner.trainer import Trainer
from orz_async.recipes import LAYOUTS, RECIPES
from orz_async.records import Span, float32_bytes, int32_bytes


@pytest.fixture(autouse=True)
def layers_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is the memory of a GPU, where norms and gates are transformers' own."""
    monkeypatch.setattr(model_module, "fuse", lambda module: None)


SIZES = ((128, 256, 2, 2, 2), (256, 1024, 8, 2, 4), (384, 1024, 6, 6, 6))


@pytest.mark.parametrize("family", kit.FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    config = kit.model_config(family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = Shape.from_config(config.to_dict())
    assert shape.policy == sum(p.numel() for p in model.parameters())
    assert shape.backbone == sum(p.numel() for p in model.model.parameters())


def test_known_models_have_their_published_sizes() -> None:
    """Parameter counts of the model cards (0.49B, 1.54B, 7.61B, 32.5B), to the digit where the files give it."""
    assert {name: shape.policy for name, shape in QWEN25.items()} == {
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-1.5B": 1_543_714_304,
        "Qwen2.5-7B": 7_615_616_512,
        "Qwen2.5-32B": 32_763_876_352,
    }


def sized(path: Path, size: tuple[int, ...]) -> Path:
    hidden, intermediate, heads, kv_heads, layers = size
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def batch(sequences: int, prompt: int, response: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        kit.trajectory(
            rng,
            n,
            prompt=int32_bytes(rng.integers(0, 512, prompt)),
            response=int32_bytes(rng.integers(0, 512, response)),
            logprobs=float32_bytes(-rng.uniform(5, 7, response)),
        )
        for n in range(sequences)
    ]


def measured_peak(config: Config, rollouts: list[Any]) -> int:
    """Of live tensors over a whole learner step on CPU, in which one microbatch holds all rollouts."""
    policy = load_policy(config.model.path)
    trainer = Trainer(config, policy, build_critic(policy, seed=0), World.single())
    assert trainer.critic is not None
    step = trainer.begin(rollouts)  # the optimizers get their moments first: the peak is that of a later step
    trainer.update_policy(step)
    trainer.update_critic(step)
    tracker = kit.Peak()
    for module in (policy, trainer.critic):
        tracker.note(list(module.parameters()))
    for optimizer in (trainer.policy_optimizer, trainer.critic_optimizer):
        assert optimizer is not None
        tracker.note([t for s in optimizer._adam.state.values() for t in s.values() if isinstance(t, torch.Tensor)])
    with tracker:
        step = trainer.begin([msgspec.structs.replace(t, spans=(Span(1, 0),)) for t in rollouts])
        trainer.update_policy(step)
        trainer.update_critic(step)
    return tracker.peak


def sized_config(path: Path, *, prompt: int, response: int, **learner: Any) -> Config:
    tokens = 4 * (prompt + response - 1)
    fixed: dict[str, Any] = {"critic_steps": 1, "max_tokens": tokens, "audit_rollouts": 0, "warmup_steps": 0}
    return Config(
        model=ModelConfig(path=str(path)),
        learner=LearnerConfig(**(fixed | learner)),
        data=DataConfig(max_prompt_tokens=prompt),
        sampling=SamplingConfig(max_new_tokens=response),
    )


def predicted_peak(config: Config) -> tuple[str, int]:
    described = json.loads((Path(config.model.path) / "config.json").read_text())
    phase, parts = learner_peak(config, Shape.from_config(described), ranks=1)
    return phase, sum(parts.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_predicted_peak_is_within_15_percent_of_the_measured_one(
    tmp_path: Path, size: tuple[int, ...], recompute: bool
) -> None:
    config = sized_config(sized(tmp_path, size), prompt=32, response=160, activation_checkpointing=recompute)
    measured = measured_peak(config, batch(4, 32, 160))
    phase, predicted = predicted_peak(config)
    print(f"{size} recompute {recompute}: predicted {predicted:,} measured {measured:,}, {predicted / measured:.3f}")
    assert phase == "policy's backward pass"
    assert abs(predicted / measured - 1) < 0.15


def test_offloaded_moments_count_in_the_step_that_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of its own, which the tracker does not see: moments leave for numpy and come back as new tensors. With few
    tokens the optimizer's step is the peak; with many the backward pass is, and the moments are away in it."""

    def send_away(self: Optimizer) -> None:
        for state in self._adam.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = state[moment].numpy().copy()

    def fetch(self: Optimizer) -> None:
        for state in self._adam.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.from_numpy(state[moment]).clone()

    monkeypatch.setattr(Optimizer, "_send_away", send_away)
    monkeypatch.setattr(Optimizer, "_fetch", fetch)
    path = sized(tmp_path, SIZES[1])
    for prompt, response, expected in ((4, 8, "optimizer step"), (32, 160, "backward pass")):
        config = sized_config(path, prompt=prompt, response=response, offload_optimizer=True)
        measured = measured_peak(config, batch(4, prompt, response))
        phase, predicted = predicted_peak(config)
        print(f"{phase}: predicted {predicted:,} measured {measured:,}, {predicted / measured:.3f}")
        assert phase.endswith(expected), "policy and critic are nearly of one size"
        assert abs(predicted / measured - 1) < 0.15


def test_recomputing_sharding_and_offloading_save_what_they_should() -> None:
    shape, config = QWEN25["Qwen2.5-7B"], RECIPES["orz_7b_8gpu"]()
    whole = activation_bytes(shape, 16384, width=2, recompute=False)
    assert activation_bytes(shape, 16384, width=2, recompute=True) < 0.15 * whole
    four, eight = (learner_phases(config, shape, ranks=n)["policy's backward pass"] for n in (4, 8))
    assert four["policy weights"] == 2 * eight["policy weights"]
    assert four["activations"] == eight["activations"]
    assert four["policy optimizer"] == 0, "it is in host memory"
    step = learner_phases(config, shape, ranks=4)["policy's optimizer step"]
    assert step["policy optimizer"] == 8 * shape.policy // 4, "there it is not"
    assert "activations" not in step and step["critic optimizer"] == 0
    away = kit.changed(config, offload_critic=True)
    phases = learner_phases(away, shape, ranks=4)
    assert phases["policy's backward pass"]["critic weights"] == 0
    assert phases["critic's backward pass"]["critic weights"] == 4 * shape.critic // 4


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_dry_run(name: str) -> None:
    config = RECIPES[name]()
    ranks = LAYOUTS[name].learner_gpus if name in LAYOUTS else 1
    text = dry_run(config, ranks)
    assert "Would start:" in text
    assert f"--nproc-per-node {ranks}" in text
    if name in LAYOUTS:
        assert f"Memory of each of {ranks} learner ranks, at most in the policy's" in text
        assert "MISSING" in text
    if name.startswith("orz_"):
        assert config.broker.rollouts_per_step == 8192
        assert (config.learner.policy_steps, config.learner.critic_steps) == (1, 12)
