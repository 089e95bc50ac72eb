"""Policy and critic as Hugging Face directories, so that any tool can load what was trained."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedConfig

from orz_async.errors import DiskError
from orz_async.learner.tensor_file import TensorFiles
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
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    files = TensorFiles(trainer.world)
    parts: list[tuple[Path, nn.Module, PreTrainedConfig]] = [
        (temporary, trainer.policy, _config(trainer.policy.config, dtype))
    ]
    if trainer.critic is not None:
        parts.append((temporary / "critic", trainer.critic, _critic_config(trainer.policy.config, dtype)))
    if trainer.world.is_first:
        with files.attempt():
            shutil.rmtree(temporary, ignore_errors=True)
            for directory, _, config in parts:
                directory.mkdir(parents=True)
                config.save_pretrained(directory)
                _copy_tokenizer(source, directory)
    for directory, module, _ in parts:
        _write_weights(files, directory, module, dtype)
    if not trainer.world.is_first:
        return
    try:
        files.check()
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(
            f"{target}: expected to write the model, found: {error}; free space and resume the run"
        ) from error


def _write_weights(files: TensorFiles, directory: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """All ranks: the module's parameters, in as many files as their size asks for."""
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    sizes = {name: torch.empty(t.shape, dtype=dtype, device="meta") for name, t in named.items()}
    shards = split_torch_state_dict_into_shards(sizes)
    for name, keys in shards.filename_to_tensors.items():
        files.write(directory / name, [(key, named[key]) for key in keys], dtype=dtype, metadata={"format": "pt"})
    if shards.is_sharded and files.world.is_first:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        with files.attempt():
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _copy_tokenizer(source: Path, directory: Path) -> None:
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
