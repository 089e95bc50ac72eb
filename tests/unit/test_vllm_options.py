"""What of vLLM may be set, without vLLM: what would bias training is refused with its reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orz_async.config import Config, GeneratorConfig
from orz_async.errors import ConfigError
from orz_async.generator.vllm_options import BIASED, OURS, parse_options, refuse
from orz_async.launcher.commands import generator

ROOT = Path(__file__).parents[2]


def test_values_are_json_where_they_can_be() -> None:
    found = parse_options(["gpu_memory_utilization=0.8", "--block-size=16", "attention_backend=FLASH_ATTN", "x=[1]"])
    assert found == {"gpu_memory_utilization": 0.8, "block_size": 16, "attention_backend": "FLASH_ATTN", "x": [1]}


@pytest.mark.parametrize("name", sorted(BIASED))
def test_what_would_bias_training_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=f"expected sampling from the policy itself, found {name}: ") as caught:
        parse_options([f"{name.replace('_', '-')}=0.9"])
    assert BIASED[name] in str(caught.value)


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_something_else_sets_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"found {name}; it is set by"):
        parse_options([f"{name}=1"])


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="found block_sise; did you mean block_size"):
        refuse({"block_sise": 16}, ["block_size", "seed"])
    with pytest.raises(ConfigError, match="expected --vllm NAME=VALUE, found 'block_size'"):
        parse_options(["block_size"])


def test_settings_of_vllm_need_vllm() -> None:
    for settings in ({"tensor_parallel": 2}, {"data_parallel": 2}, {"vllm": ("block_size=16",)}):
        with pytest.raises(ConfigError, match=r"generator\.engine vllm"):
            GeneratorConfig(**settings)  # type: ignore[arg-type]
        GeneratorConfig(engine="vllm", **settings)  # type: ignore[arg-type]


def test_daemons_may_have_an_interpreter_of_their_own() -> None:
    settings = GeneratorConfig(engine="vllm", python="elsewhere/python", tensor_parallel=2, vllm=("block_size=16",))
    argv = generator(Config(generator=settings), 0).argv
    assert argv[0] == "elsewhere/python"
    assert argv[argv.index("--tensor-parallel") + 1] == "2" and argv[argv.index("--vllm") + 1] == "block_size=16"
    assert generator(Config(), 0).argv[0] == sys.executable and "--tensor-parallel" not in generator(Config(), 0).argv


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "vllm", "--vllm", "top_p=0.9"], "the log-probs are no longer those of the policy"),
        (["--vllm", "block_size=16"], "generator.vllm needs generator.engine vllm"),
    ],
)
def test_the_daemon_says_so_before_it_does_anything(options: list[str], words: str) -> None:
    argv = [sys.executable, "-m", "orz_async.generator", "--connect", "tcp://127.0.0.1:1", *options]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words in done.stderr, done.stderr
