"""Policy and critic as Hugging Face directories, so that any tool can load what was trained."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from orz_async.errors import DiskError
from orz_async.learner.parallel import full_parameters
from orz_async.learner.trainer import Trainer

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("chat_template*", "generation_config.json"),
)


def export(trainer: Trainer, *, source: Path, target: Path) -> None:
    """All ranks; rank 0 writes `target` (the policy, with the tokenizer of `source`) and `target`/critic.

    The directory appears as a whole. The critic is a token classifier with one label: its score for a token is the
    value of the state after it.
    """
    dtype = getattr(torch, trainer.config.model.dtype)
    policy = _collect(trainer, full_parameters(trainer.policy), dtype)
    critic = _collect(trainer, full_parameters(trainer.critic), dtype) if trainer.critic is not None else None
    if not trainer.world.is_first:
        return
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _write_model(temporary, _config(trainer.policy.config, dtype), policy, source)
        if critic is not None:
            _write_model(temporary / "critic", _critic_config(trainer.policy.config, dtype), critic, source)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(
            f"{target}: expected to write the model, found: {error}; free space and resume the run"
        ) from error


def _collect(trainer: Trainer, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for name, tensor in named:
        if trainer.world.is_first:
            kept[name] = tensor.to("cpu", dtype).contiguous()
    return kept


def _write_model(directory: Path, config: PreTrainedConfig, state: dict[str, Tensor], source: Path) -> None:
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    shards = split_torch_state_dict_into_shards(state)
    for name, keys in shards.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, directory / name, metadata={"format": "pt"})
    if shards.is_sharded:
        import json

        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)


def _config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    own = copy.deepcopy(config)
    own.dtype = dtype
    return own


def _critic_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    own = _config(config, dtype)
    own.architectures = [name.replace("ForCausalLM", "ForTokenClassification") for name in own.architectures or []]
    own.num_labels = 1
    own.classifier_dropout = 0.0
    return own
