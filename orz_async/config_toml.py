"""A configuration as TOML and back, exactly; unknown names are refused with the nearest right one.

TOML has no null: None is written as the string "none".
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from orz_async.config import Config
from orz_async.errors import ConfigError

T = TypeVar("T")

NONE = "none"


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that ends an error message: the most similar valid name, or all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"valid names are {', '.join(names)}"


def is_optional(kind: object) -> bool:
    return type(None) in get_args(kind)


def type_name(kind: Any) -> str:
    """A field's type as a user writes it: float, "a" or "b", list of 2 float, float or "none"."""
    arguments = get_args(kind)
    if is_optional(kind):
        return f'{" or ".join(type_name(a) for a in arguments if a is not type(None))} or "{NONE}"'
    if getattr(kind, "__origin__", None) is tuple:
        length = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"list of {length}{type_name(arguments[0])}"
    if arguments:  # Literal
        return " or ".join(f'"{a}"' for a in arguments)
    return "true or false" if kind is bool else str(getattr(kind, "__name__", kind))


def _quoted(text: str) -> str:
    # JSON's string escapes are TOML's, except that TOML also wants DEL escaped.
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


def _value(value: object) -> str:
    if value is None:
        return _quoted(NONE)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    assert isinstance(value, int | float), f"a configuration field holds {type(value).__name__}"
    return repr(value)


def to_toml(config: Config) -> str:
    """Every field of the resolved configuration; `from_toml` gives back an equal Config."""
    plain, sections = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines = [f"{f.name} = {_value(getattr(value, f.name))}" for f in dataclasses.fields(value)]
            sections.append("\n".join([f"[{field.name}]", *lines]))
        else:
            plain.append(f"{field.name} = {_value(value)}")
    return "\n\n".join(["\n".join(plain), *sections]) + "\n"


def _leaf(kind: Any, value: object, where: str) -> object:
    if is_optional(kind) and value == NONE:
        return None
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        found = NONE if value is None else repr(value)
        raise ConfigError(f"expected {type_name(kind)} for {where}, found {found}; correct that value") from None


def _build(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(kind)
    values: dict[str, object] = {}
    for name, value in table.items():
        path = f"{where}{name}"
        if name not in hints:
            raise ConfigError(f"expected a known setting, found {path}; {nearest(name, hints)}")
        if not dataclasses.is_dataclass(hints[name]):
            values[name] = _leaf(hints[name], value, path)
        elif isinstance(value, dict):
            values[name] = _build(hints[name], value, f"{path}.")
        else:
            raise ConfigError(
                f"expected a section [{path}], found {path} = {value!r}; write its settings under [{path}]"
            )
    return kind(**values)


def from_toml(text: str, name: str = "the TOML text") -> Config:
    """The configuration that a TOML text describes; settings that are absent have the defaults of `Config`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"expected TOML in {name}, found a syntax error: {error}; correct that line") from None
    try:
        return _build(Config, table, "")
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def load(path: Path) -> Config:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"expected a TOML file at {path}, found nothing; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a readable TOML file at {path}, found {error}; check the path") from None
    return from_toml(text, str(path))


def config_hash(config: Config) -> str:
    """Names a configuration; where the run lies on disk is not part of it."""
    text = to_toml(dataclasses.replace(config, run_dir=""))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """Settings that differ, by dotted name: (old, new)."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def leaves(config: Config) -> Iterable[tuple[str, object]]:
    """Every setting as (dotted name, value)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
        else:
            yield field.name, value
