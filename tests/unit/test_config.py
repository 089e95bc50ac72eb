"""Configuration: TOML and command line give back exactly what was said, or say what is wrong with it."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from orz_async.cli_config import parse_config, settings
from orz_async.config import Config
from orz_async.config_toml import config_hash, differences, from_toml, is_optional, to_toml
from orz_async.errors import ConfigError, ExitCode
from orz_async.recipes import RECIPES, tiny_cpu


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Anything of a field's type; `configs` leaves out what the cross-checks refuse."""
    arguments = typing.get_args(kind)
    if is_optional(kind):
        return st.none() | values(next(a for a in arguments if a is not type(None)))
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is ...:
            return st.lists(values(arguments[0]), max_size=4).map(tuple)
        return st.tuples(*(values(a) for a in arguments))
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(arguments)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(min_size=1),
        int: st.integers(-(2**62), 2**62),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
    }
    return simple[kind]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    sections: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config).items():
        if not dataclasses.is_dataclass(kind):
            sections[name] = draw(values(kind))
            continue
        section = kind()
        for field, hint in typing.get_type_hints(kind).items():
            try:
                section = dataclasses.replace(section, **{field: draw(values(hint))})
            except ConfigError:
                continue
        sections[name] = section
    sections["steps"], sections["seed"] = abs(sections["steps"]) + 1, abs(sections["seed"])
    return Config(**sections)


@settings_of_hypothesis(max_examples=40, deadline=None)
@given(configs())
def test_toml_round_trip_is_exact(config: Config) -> None:
    text = to_toml(config)
    assert from_toml(text) == config
    assert to_toml(from_toml(text)) == text


def test_every_setting_is_written_and_has_its_type_back() -> None:
    config = dataclasses.replace(tiny_cpu(), learner=dataclasses.replace(tiny_cpu().learner, value_clip=None))
    text = to_toml(config)
    for name in settings():
        assert f"{name.rpartition('.')[2]} = " in text
    back = from_toml(text)
    assert back.learner.value_clip is None
    assert back.sampling.stop == ("</answer>",)
    assert isinstance(back.sampling.stop, tuple)
    assert isinstance(back.learner.adam_betas, tuple)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_overrides_is_itself(name: str) -> None:
    assert parse_config([name]) == RECIPES[name]()


def test_overrides_of_every_kind() -> None:
    words = "--learner.lr 3e-4 --broker.max_lag=0 --sampling.max-new-tokens 12 --learner.value-clip none"
    words += " --learner.behaviour-cap 2 --learner.adam-betas 0.8 0.9 --generator.keep-kv true --sampling.stop a b"
    config = parse_config(["tiny-cpu", *words.split()])
    assert config.learner.lr == 3e-4
    assert config.broker.max_lag == 0
    assert config.sampling.max_new_tokens == 12
    assert config.learner.value_clip is None
    assert config.learner.behaviour_cap == 2.0
    assert config.learner.adam_betas == (0.8, 0.9)
    assert config.generator.keep_kv is True
    assert config.sampling.stop == ("a", "b")
    assert config.learner.critic_lr == tiny_cpu().learner.critic_lr


def test_a_file_is_the_base_of_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('steps = 7\n[learner]\nlr = 1\nclip_low = 0.1\ndual_clip = "none"\n')
    config = parse_config([str(path), "--learner.lr", "0.5"])
    assert (config.steps, config.learner.lr, config.learner.clip_low) == (7, 0.5, 0.1)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["recipe", "nothing"]),
        ("tinycpu", ["tinycpu", "did you mean tiny_cpu"]),
        ("no/such.toml", ["no/such.toml", "check the path"]),
        ("tiny_cpu --learner.lrr 1", ["--learner.lrr", "did you mean learner.lr?"]),
        ("tiny_cpu --lr 1", ["--lr", "did you mean --learner.lr?"]),
        ("tiny_cpu --learner.lr abc", ["expected float", "--learner.lr", "'abc'"]),
        ("tiny_cpu --learner.lr", ["expected float", "--learner.lr", "nothing"]),
        ("tiny_cpu --steps 1.5", ["expected int", "--steps", "1.5"]),
        ("tiny_cpu --steps 1 2", ["expected int", "--steps", "1 2"]),
        ("tiny_cpu --learner.adam-betas 0.9", ["list of 2 float", "--learner.adam_betas", "0.9"]),
        ("tiny_cpu --model.dtype fp32", ['"float32" or "bfloat16"', "fp32"]),
        ("tiny_cpu --generator.keep-kv maybe", ["true or false", "maybe"]),
        ("tiny_cpu --broker.max-lag -1", ["broker.max_lag", "-1"]),
        ("tiny_cpu steps 1", ["'steps'", "begin a setting with --"]),
    ],
)
def test_a_wrong_command_line_says_what_and_how(words: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(words.split())
    assert caught.value.exit_code is ExitCode.CONFIG
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps = \nseed = 1", ["syntax error", "line 1"]),
        ("stepz = 3", ["stepz", "did you mean steps?"]),
        ("[lerner]\nlr = 1.0", ["lerner", "did you mean learner?"]),
        ("[learner]\nmax_token = 1", ["learner.max_token", "did you mean max_tokens?"]),
        ("[learner]\nlr = true", ["expected float", "learner.lr", "True"]),
        ('[learner]\nlr = "2e-4"', ["expected float", "learner.lr", "'2e-4'"]),
        ('[learner]\nvalue_clip = "nil"', ['float or "none"', "learner.value_clip", "nil"]),
        ("steps = 1.5", ["expected int", "steps", "1.5"]),
        ("[learner]\nadam_betas = [0.9]", ["list of 2 float", "[0.9]"]),
        ("[sampling]\nstop = ['a', 3]", ["list of str", "sampling.stop"]),
        ("learner = 3", ["section [learner]"]),
        ("[broker]\nmax_lag = -1", ["broker.max_lag", "-1"]),
        ("seed = -1", ["seed", "-1"]),
    ],
)
def test_wrong_toml_says_what_and_where(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_toml(text, "mine.toml")
    for part in ["mine.toml", *parts]:
        assert part in str(caught.value)


def test_help_shows_meaning_and_the_recipes_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["tiny_cpu", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ["--learner.lr", "Policy learning rate after warm-up", "0.0002", "tiny_cpu", "0 is synchronous"]:
        assert part in text


def test_the_hash_names_the_configuration_but_not_its_place() -> None:
    config = tiny_cpu()
    moved = dataclasses.replace(config, run_dir="elsewhere")
    changed = dataclasses.replace(config, seed=1)
    assert config_hash(config) == config_hash(moved) != config_hash(changed)
    assert differences(config, changed) == {"seed": (0, 1)}
