"""The command `orz`, as a user types it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import learner_kit as kit
import pytest

from orz_async import cli
from orz_async.config_toml import from_toml
from orz_async.errors import ConfigError, DataError, ModelError
from orz_async.observe.progress import Progress

ROOT = Path(__file__).parents[2]


def orz(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "orz_async.cli", *words]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_a_dry_run_prints_the_configuration_and_starts_nothing(tmp_path: Path) -> None:
    done = orz("run", "tiny_cpu", "--dry-run", "--learner.lr", "3e-4", "--ranks=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert from_toml(done.stdout).learner.lr == 3e-4
    assert "--nproc-per-node 2" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_output_of_a_dry_run_is_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(orz("run", "tiny_cpu", "--steps", "3", "--dry-run").stdout)
    again = orz("run", "mine.toml", "--dry-run", cwd=tmp_path)
    # Comments say what is there and what would be started, which depends on where one stands.
    written, read = (
        [line for line in text.splitlines() if not line.startswith("#")]
        for text in ((tmp_path / "mine.toml").read_text(), again.stdout)
    )
    assert written == read


def test_a_wrong_word_ends_with_code_2_and_three_parts_on_stderr() -> None:
    done = orz("run", "tiny_cpu", "--learner.lrr", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "orz: ConfigError (exit 2)\n  expected a known setting, found --learner.lrr; did you mean learner.lr?\n"
    )


def test_output_that_nobody_reads_is_no_crash() -> None:
    command = f"{sys.executable} -m orz_async.cli run tiny_cpu --help | head -c 10"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)


def test_run_help_teaches_options_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.dispatch(["run", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("--dry-run", "--resume", "--overwrite", "--broker.max-lag", "0 is synchronous", "tiny_cpu"):
        assert part in text


def test_version_names_what_decides_results_and_no_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["version"]) == 0
    text = capsys.readouterr().out
    for name in ("orz_async", "python", "torch", "transformers", "numpy", "msgspec", "zmq", "os"):
        assert f"\n{name} " in f"\n{text}"
    assert os.uname().nodename not in text.split() or os.uname().nodename in ("localhost", "linux")


def test_an_unknown_command_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean summary"):
        cli.dispatch(["sumary", "runs/x"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("run tiny_cpu --resume --overwrite", "found both"),
        ("run tiny_cpu --ranks 1.5", "whole number"),
        ("run tiny_cpu --ranks", "positive number for --ranks, found nothing"),
        ("run tiny_cpu --drain-s=-1", "positive number for --drain-s, found -1"),
        ("run --dry-run", "expected a recipe"),
        ("summary no/such/run", "no no/such/run/config.toml"),
    ],
)
def test_wrong_words_are_explained(words: str, parts: str) -> None:
    with pytest.raises(ConfigError, match=parts):
        cli.dispatch(words.split())


def test_a_wrong_input_costs_a_sentence_and_starts_nothing(tmp_path: Path) -> None:
    words = ["run", "tiny_cpu", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(ModelError, match=r"model\.path: expected a directory .* found no directory .*no/such/model"):
        cli.dispatch([*words, "--model.path", "no/such/model"])
    model = kit.save_model(tmp_path / "model")
    with pytest.raises(DataError, match=r"no/such\.jsonl: expected a readable file of problems"):
        cli.dispatch([*words, "--model.path", str(model), "--data.train", "no/such.jsonl"])
    assert not (tmp_path / "run").exists()


def test_options_are_taken_wherever_they_stand() -> None:
    argv = ["--dry_run", "tiny_cpu", "--drain_s", "5", "--steps", "3"]
    assert cli.take_flag(argv, "--dry-run")
    assert not cli.take_flag(argv, "--resume")
    assert cli.take_number(argv, "--drain-s", 1.0) == 5.0
    assert cli.take_number(argv, "--ranks", 1.0) == 1.0
    assert argv == ["tiny_cpu", "--steps", "3"]


def test_progress_says_how_long_it_takes() -> None:
    out = io.StringIO()
    with Progress(out) as progress:
        progress("base model: step 1 of 2", 0.5)
        progress("never shown, too soon after", 0.6)
    assert out.getvalue() == "base model: step 1 of 2 (50%, 0:00 left)\n"
