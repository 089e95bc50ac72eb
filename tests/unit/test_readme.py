"""Every command of the README is one that the programs accept."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from orz_async.cli_config import parse_config
from orz_async.generator import __main__ as generator

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line.partition("#")[0].strip().removesuffix("&") for block in BLOCKS for line in block.split("\n")]
LINES = [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in LINES]


def lines(*starts: str) -> list[str]:
    found = [line for line in LINES if line.startswith(starts)]
    assert found, f"no line of the README starts with {starts}"
    return found


@pytest.mark.parametrize("line", lines("python -m orz_async.generator"))
def test_generators(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("PORT", "5555") for word in shlex.split(line)[3:]]
    generator.dry_run(generator.parser().parse_args(words))
    assert "would connect to" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in lines("torchrun", "orz run") if ".toml" not in line])
def test_learners_and_runs(line: str) -> None:
    words = [word for word in shlex.split(line) if word != "--dry-run"]
    if words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        assert (options.training_script, options.module) == ("orz_async.learner", True)
        words = ["orz", "run", *options.training_script_args]
    parse_config(words[2:])
