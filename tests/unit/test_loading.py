"""Weights straight into shards: the same bits as transformers loads. What several ranks read: test_parallel.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learner_kit as kit
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from orz_async.errors import ModelError
from orz_async.learner.export import export
from orz_async.learner.hf_directory import inspect
from orz_async.learner.loading import load_base, materialise, meta_causal_lm
from orz_async.learner.model import load_models, meta_models
from orz_async.learner.parallel import World
from orz_async.learner.tensor_file import header


def reference(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("family", kit.FAMILIES)
def test_bits_and_buffers_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    path = kit.save_model(tmp_path, family)
    policy, critic = meta_models(inspect(path), seed=3)
    assert critic is not None
    assert all(p.is_meta for p in policy.parameters()), "built without memory"
    for module in (policy, critic):
        materialise(module, torch.device("cpu"))
    load_models(policy, critic, inspect(path))
    want = reference(path)
    found = dict(policy.named_parameters())
    assert found.keys() == dict(want.named_parameters()).keys()
    for name, parameter in want.named_parameters():
        assert torch.equal(found[name], parameter), name
    for name, buffer in want.model.named_buffers():
        assert torch.equal(dict(policy.model.named_buffers())[name], buffer), name
        assert torch.equal(dict(critic.model.named_buffers())[name], buffer), name
    for name, parameter in want.model.named_parameters():
        assert torch.equal(dict(critic.model.named_parameters())[name], parameter), name
    tied = bool(want.config.tie_word_embeddings)
    assert (policy.lm_head.weight is policy.model.get_input_embeddings().weight) == tied
    assert 0 < critic.score.weight.std() < 2 / 33


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_another_dtype_are_cast_once(tmp_path: Path, dtype: torch.dtype) -> None:
    kit.random_causal_lm("llama").to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    module = meta_causal_lm(inspect(tmp_path))
    materialise(module, torch.device("cpu"))
    load_base(module, inspect(tmp_path))
    for (name, got), (_, want) in zip(
        module.named_parameters(), kit.random_causal_lm("llama").named_parameters(), strict=True
    ):
        assert torch.equal(got, want.to(dtype).float()), name


@pytest.fixture
def group() -> Iterator[World]:
    world = World.start(need_group=True)
    yield world
    world.close()


def test_shards_get_memory_and_weights_of_their_own(tmp_path: Path, group: World) -> None:
    path = kit.save_model(tmp_path, "qwen2")
    policy, critic = meta_models(inspect(path), seed=3)
    assert critic is not None
    for module in (policy, critic):
        group.shard(module, module.layers, dtype=torch.bfloat16)
    load_models(policy, critic, inspect(path))
    want = dict(reference(path).named_parameters())
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), want[name]), name
    assert policy.lm_head.weight is policy.model.get_input_embeddings().weight, "still tied"


@pytest.mark.parametrize("family", kit.FAMILIES)
def test_what_is_exported_is_what_transformers_loads(tmp_path: Path, family: str) -> None:
    """Policy with its head, tied or not, and the critic, under the names of the family."""
    path = kit.save_model(tmp_path / "model", family)
    trainer = kit.trainer(kit.config(path))
    step = trainer.begin(kit.rollouts(4))
    trainer.update_policy(step)
    trainer.update_critic(step)
    export(trainer, source=path, target=tmp_path / "export")
    loaded = reference(tmp_path / "export")
    for (name, got), (_, want) in zip(loaded.named_parameters(), trainer.policy.named_parameters(), strict=True):
        assert torch.equal(got, want), name
    assert trainer.critic is not None
    stored = load_file(tmp_path / "export" / "critic" / "model.safetensors")
    for name, parameter in trainer.critic.named_parameters():
        assert torch.equal(stored[name], parameter), name


def test_extra_layers_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    path = kit.save_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}))
    with pytest.raises(ModelError, match="belongs to no layer"):
        load_base(meta_causal_lm(inspect(path)), inspect(path))
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match="has shape"):
        load_base(meta_causal_lm(inspect(path)), inspect(path))


def test_a_backbone_saved_without_its_head_loads(tmp_path: Path) -> None:
    path = kit.save_model(tmp_path, "qwen2")
    tensors = load_file(path / "model.safetensors")
    renamed = {name.removeprefix("model."): t for name, t in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    module = meta_causal_lm(inspect(path))
    materialise(module, torch.device("cpu"))
    load_base(module, inspect(path))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, tensors[name]), name


@pytest.mark.parametrize("name", ["a", "ab", "abcdefgh"])
def test_tensors_of_a_file_begin_at_a_multiple_of_eight(name: str) -> None:
    """Whoever maps the file may then read them where they lie."""
    assert len(header([(name, torch.float32, (2, 3))], {})) % 8 == 0
