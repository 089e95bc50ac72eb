"""The dry run's count of parameters is the model's own, and tells every name in which the weight files differ."""

from __future__ import annotations

from pathlib import Path

import learner_kit as kit
import pytest
from safetensors.torch import load_file, save_file

from orz_async.config import Config, LearnerConfig, ModelConfig
from orz_async.launcher.commands import dry_run
from orz_async.learner.census import census, parts


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_parts_are_those_of_the_real_model(tmp_path: Path, family: str) -> None:
    model = kit.random_causal_lm(family)
    model.save_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    head = "" if model.config.tie_word_embeddings else f" + head {embedding:,}"
    whole = sum(p.numel() for p in model.parameters())
    policy, critic, *files = census(tmp_path, with_critic=True)
    assert policy.endswith(f": {whole:,} = embedding {embedding:,} + 2 layers {layers:,} + norm 32{head}")
    backbone = sum(p.numel() for p in model.model.parameters())
    assert critic.endswith(f": {backbone + 33:,} = embedding {embedding:,} + 2 layers {layers:,} + norm 32 + head 33")
    count = len(list(model.named_parameters()))
    assert files == [
        f"all {count} tensors of the policy are in the weight files",
        f"all {count - bool(head)} tensors of the critic are in the weight files",
    ]
    assert len(census(tmp_path, with_critic=False)) == 2
    assert parts(model) == policy.partition(": ")[2]


def test_names_that_differ_are_told(tmp_path: Path) -> None:
    path = kit.save_model(tmp_path, "qwen2")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    text = dry_run(Config(model=ModelConfig(path=str(path)), learner=LearnerConfig(estimator="grpo")), 1)
    assert "differ in 3 names" in text
    assert "model.layers.1.mlp.up_proj.weight is missing" in text
    assert "model.norm.weight has shape (5,) instead of (32,)" in text
    assert "model.layers.7.mlp.up_proj.weight is not of this model" in text
    assert "Critic" not in text


def test_a_config_without_weights_is_built_and_a_broken_one_told(tmp_path: Path) -> None:
    path = kit.save_model(tmp_path, "qwen2")
    (path / "model.safetensors").unlink()
    config = Config(model=ModelConfig(path=str(path)))
    text = dry_run(config, 1)
    assert "Policy built on the meta device" in text and "weight files" not in text
    (path / "config.json").write_text((path / "config.json").read_text().replace('"qwen2"', '"nothing"'))
    assert "Model directory: " in dry_run(config, 1)
