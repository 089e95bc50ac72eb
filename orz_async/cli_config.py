"""The command line as a configuration: a recipe or TOML file first, then overrides such as `--learner.lr 2e-4`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from orz_async.config import Config
from orz_async.config_toml import NONE, config_hash, from_toml, is_optional, load, nearest, to_toml, type_name
from orz_async.errors import ConfigError
from orz_async.recipes import RECIPES

__all__ = ["RECIPES", "config_hash", "from_toml", "parse_config", "to_toml"]

HELP = {"-h", "--help"}


def settings() -> dict[str, Any]:
    """Dotted name -> type of every setting."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{field}": hint for field, hint in get_type_hints(kind).items()}
        else:
            found[name] = kind
    return found


def recipe_or_file(name: str) -> Config:
    """A recipe by its name, or a TOML file by its path."""
    if recipe := RECIPES.get(name.replace("-", "_")):
        return recipe()
    if name.endswith(".toml") or "/" in name:
        return load(Path(name))
    raise ConfigError(f"expected a recipe or the path of a TOML file, found {name!r}; {nearest(name, RECIPES)}")


def parse_config(argv: Sequence[str], prog: str = "orz run") -> Config:
    """The configuration of `RECIPE_OR_TOML [--setting value]...`; raises ConfigError for everything it does not accept.

    `--help` prints every setting with its meaning and the value it would have, and exits.
    """
    name, *rest = argv or [""]
    if name in HELP:
        name, rest = "", [name]
    elif not name or name.startswith("-"):
        raise ConfigError(
            f"expected a recipe or the path of a TOML file first, found {name or 'nothing'}; "
            f"write for example `{prog} {next(iter(RECIPES))}`"
        )
    base = recipe_or_file(name) if name else Config()
    if not HELP.isdisjoint(rest):
        rest = ["--help"]
    groups = _group(rest)
    return _parse(base, groups, f"{prog} {name or 'RECIPE_OR_TOML'}")


def _group(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """[(flag, its values)], with known flags only, spelled as the fields are."""
    known = settings()
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        # A negative number is a value; no setting begins with a digit.
        if not word.startswith("--"):
            if not groups:
                raise ConfigError(f"expected overrides such as --steps 100, found {word!r}; begin a setting with --")
            groups[-1][1].append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in known and flag not in HELP:
            short = [full for full in known if full.endswith(f".{name}")]
            hint = f"did you mean --{short[0]}?" if short else nearest(name, known)
            raise ConfigError(f"expected a known setting, found {flag}; {hint}")
        groups.append((name, [value] if equals else []))
    return groups


def _words(name: str, values: list[str]) -> list[str]:
    kind = settings().get(name)
    if is_optional(kind) and [v.lower() for v in values] == [NONE]:
        values = ["None"]
    if kind is bool:
        values = [v.capitalize() for v in values]
    return [f"--{name}", *values]


def _parse(base: Config, groups: list[tuple[str, list[str]]], prog: str) -> Config:
    words = [word for name, values in groups for word in _words(name, values)]
    refused = io.StringIO()
    try:
        # tyro explains refusals on stderr and exits; callers get them as a ConfigError instead.
        with contextlib.redirect_stderr(refused):
            return tyro.cli(
                Config,
                description=_description(),
                default=base,
                args=words,
                prog=prog,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as end:
        if not end.code:
            raise
    raise ConfigError(_refusal(refused.getvalue(), groups, prog))


def _description() -> str:
    recipes = "\n".join(f"  {name}: {(make.__doc__ or '').strip()}" for name, make in RECIPES.items())
    return (
        "Settings of a run. A recipe or the path of a TOML file comes first, overrides follow; in a TOML file the "
        "same names are keys under [sections]. Defaults shown are those of the recipe or file given; times are in "
        f"seconds. Recipes:\n{recipes}"
    )


def _refusal(text: str, groups: list[tuple[str, list[str]]], prog: str) -> str:
    known = settings()
    for named in re.findall(r"--([\w.-]+)", text):
        name = named.replace("-", "_")
        for flag, values in groups:
            if flag == name and name in known:
                found = " ".join(values) or "nothing"
                return f"expected {type_name(known[name])} for --{name}, found {found!r}; see {prog} --help"
    for flag, values in groups:
        if len(values) > 1:
            return f"expected {type_name(known[flag])} for --{flag}, found {' '.join(values)!r}; see {prog} --help"
    return f"expected settings as {prog} --help shows them, found: {' '.join(text.split())}"
