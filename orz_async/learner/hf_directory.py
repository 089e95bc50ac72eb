"""Checks of a Hugging Face model directory before anything is loaded from it: says what is wrong, file by file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from orz_async.errors import ModelError

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")
"""Values of `model_type` whose packed forward is tested against their padded one."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_MAX_JSON_BYTES = 64_000_000
_BITS = {
    name: bits
    for bits, names in ((64, "F64 I64 U64"), (32, "F32 I32 U32"), (16, "F16 BF16 I16 U16"), (8, "I8 U8 BOOL"))
    for name in names.split()
}


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """A directory whose config is of a known family and whose weight files are complete."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor in the weight files."""
    files: dict[str, Path]
    """Which file holds it."""


def inspect(path: str | Path) -> ModelDirectory:
    """Read config.json and the headers of the weight files; ModelError where they do not make one usable model."""
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"model.path: expected a directory with config.json and *.safetensors, found no directory {directory}; "
            "download or make the model first (`orz make-base` makes a small one)"
        )
    config = _read_json(directory / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{directory / 'config.json'}: expected model_type in {FAMILIES}, found {family!r}")
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for file in _weight_files(directory):
        found = read_shapes(file)
        shapes |= found
        files |= dict.fromkeys(found, file)
    _check_vocabulary(directory, config, shapes)
    return ModelDirectory(directory, config, shapes, files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes, found {path.stat().st_size}")
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise ModelError(f"{path}: expected this file, found none; is model.path the model's own folder?") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path}: expected a JSON object, found: {error}; copy the file again") from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if single.exists():
            return [single]
        found = sorted(p.name for p in directory.iterdir())
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in found)
        advice = "convert the pickled weights to safetensors" if pickled else "copy the missing files"
        raise ModelError(f"{directory}: expected model.safetensors or its index, found {found}; {advice}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(
            f"{index}: expected an object `weight_map` from tensor to file, found {type(weight_map).__name__}"
        )
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index}: expected plain file names, found {outside}")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ModelError(
            f"{directory}: expected the {len(names)} files of the index, found no {missing}; copy them too"
        )
    return [directory / name for name in names]


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes from the header of one safetensors file, whose size must be exactly what the header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(
                f"{path}: expected a safetensors header, found {size} bytes without one; copy the file again"
            )
        raw = file.read(length)
    try:
        header = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in header.items()}
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: expected a safetensors header, found: {error}; copy the file again") from error
    expected = 8 + length + max((e.data_offsets[1] for e in entries.values()), default=0)
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise ModelError(f"{path}: expected {expected} bytes, found {size}: the file is {state}; copy it again")
    for name, entry in entries.items():
        bits = _BITS.get(entry.dtype)
        span = entry.data_offsets[1] - entry.data_offsets[0]
        if bits is None or span * 8 != math.prod(entry.shape) * bits:
            raise ModelError(f"{path}: expected {name} to fill {entry.dtype} {entry.shape}, found {span} bytes")
    return {name: entry.shape for name, entry in entries.items()}


def _check_vocabulary(directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    vocab_size = config.get("vocab_size")
    for name, shape in shapes.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and shape[0] != vocab_size:
            raise ModelError(
                f"{directory}: expected {name} with vocab_size = {vocab_size} rows (config.json), found {shape[0]}: "
                "config and weights belong to different models"
            )


def check_tokenizer(directory: str | Path, *, tokenizer_size: int, vocab_size: int) -> None:
    """A tokenizer may know fewer ids than the model has rows (padded vocabularies), never more."""
    if tokenizer_size > vocab_size:
        raise ModelError(
            f"{directory}: expected a tokenizer with ids below the model's vocab_size = {vocab_size}, found "
            f"{tokenizer_size} ids; tokenizer and weights belong to different models"
        )
