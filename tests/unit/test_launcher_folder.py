"""Which run may use which folder, and what is started with which words."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from orz_async.config import Config
from orz_async.config_toml import from_toml, load
from orz_async.errors import ConfigError, DiskError
from orz_async.launcher import run_folder
from orz_async.launcher.commands import commands, dry_run
from orz_async.launcher.limits import Limits
from orz_async.launcher.run_folder import Mode, RunFolder
from orz_async.recipes import orz_7b_8gpu, small_1gpu, tiny_cpu


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return dataclasses.replace(tiny_cpu(), run_dir=str(tmp_path / "run"), steps=2)


def use(config: Config, mode: Mode = Mode.CONTINUE) -> Path:
    with RunFolder(config, mode) as folder:
        return folder.path


def train(path: Path, steps: int, *, ended: bool) -> None:
    """What a learner leaves behind."""
    lines = [{"kind": "run", "resumed_step": 0}] + [{"kind": "step", "step": step} for step in range(steps)]
    with (path / "events" / "learner-0.jsonl").open("a") as file:
        for n, line in enumerate(lines):
            file.write(json.dumps({"v": 1, "t": 1000.0 + n, "process": "learner-0", **line}) + "\n")
    if ended:
        (path / "logs" / "learner-0.exit.json").write_text('{"process": "learner-0", "code": 0, "message": ""}')


def test_a_new_folder_holds_the_configuration_and_the_versions(config: Config) -> None:
    path = use(config)
    assert load(path / "config.toml") == config
    assert json.loads((path / "versions.json").read_text())["orz_async"]
    assert (path / "events").is_dir()


def test_the_same_command_continues_an_unfinished_run(config: Config) -> None:
    path = use(config)
    train(path, 1, ended=False)
    use(config)
    train(path, 2, ended=False)
    use(config)  # all steps done, but killed before it had saved and exported
    assert (path / "events" / "learner-0.jsonl").exists()


def test_a_complete_run_is_refused_with_every_way_out(config: Config) -> None:
    path = use(config)
    train(path, 2, ended=True)
    for mode in (Mode.CONTINUE, Mode.RESUME):
        with pytest.raises(ConfigError) as caught:
            use(config, mode)
        for way in ("all 2 steps", "--resume with a larger --steps", "--overwrite", "another --run-dir"):
            assert way in str(caught.value)
    use(dataclasses.replace(config, steps=3), Mode.RESUME)
    assert load(path / "config.toml").steps == 3


def test_other_settings_are_refused_and_named(config: Config) -> None:
    path = use(config)
    other = dataclasses.replace(config, seed=5)
    with pytest.raises(ConfigError, match=r"seed 0 -> 5.*--run-dir.*--resume.*--overwrite"):
        use(other)
    assert load(path / "config.toml") == config
    use(other, Mode.RESUME)
    assert load(path / "config.toml") == other


def test_settings_that_the_learner_refused_are_not_kept(config: Config) -> None:
    path = use(config)
    with RunFolder(dataclasses.replace(config, seed=5), Mode.RESUME) as folder:
        folder.settings_refused()
    assert load(path / "config.toml") == config


def test_a_moved_folder_is_the_same_run(config: Config, tmp_path: Path) -> None:
    use(config).rename(tmp_path / "moved")
    use(dataclasses.replace(config, run_dir=str(tmp_path / "moved")))


def test_overwrite_deletes_the_run_and_nothing_else(config: Config) -> None:
    path = use(config)
    train(path, 2, ended=True)
    (path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (path / "notes.md").write_text("mine")
    use(dataclasses.replace(config, seed=5), Mode.OVERWRITE)
    assert not (path / "checkpoints").exists()
    assert list((path / "events").iterdir()) == []
    assert list((path / "logs").iterdir()) == []
    assert (path / "notes.md").read_text() == "mine"
    assert load(path / "config.toml").seed == 5


def test_overwrite_knows_all_that_is_written() -> None:
    source = Path(run_folder.__file__).parents[1]
    named = {name for file in source.rglob("*.py") for name in re.findall(r'run_dir / "([\w.]+)"', file.read_text())}
    assert {"events", "journal", "evals", "kept"} <= named  # the pattern finds what it should
    assert named <= set(run_folder.OURS)


def test_resume_needs_something_to_resume(config: Config) -> None:
    with pytest.raises(ConfigError, match="leave out --resume"):
        use(config, Mode.RESUME)


def test_a_run_without_its_configuration_is_not_guessed_at(config: Config) -> None:
    path = use(config)
    (path / "config.toml").unlink()
    with pytest.raises(ConfigError, match=r"no config.toml.*--overwrite"):
        use(config)
    use(config, Mode.OVERWRITE)


def test_two_launchers_do_not_share_a_folder(config: Config) -> None:
    with RunFolder(config, Mode.CONTINUE), pytest.raises(ConfigError, match="in use by another orz run"):
        use(config, Mode.OVERWRITE)
    use(config)


def test_a_folder_that_cannot_be_written_is_a_disk_error(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="choose another --run-dir"):
        use(dataclasses.replace(config, run_dir=str(tmp_path / "file" / "run")))


def test_what_is_started_comes_from_the_configuration() -> None:
    config = tiny_cpu()
    settings = dataclasses.replace(config.generator, count=3, slots=7, threads=2, keep_kv=True)
    config = dataclasses.replace(config, generator=settings, run_dir="runs/a b")
    found = commands(config, ranks=2)
    assert found.learner.argv[-3:] == ("-m", "orz_async.learner", "runs/a b/config.toml")
    assert found.learner.argv[found.learner.argv.index("--nproc-per-node") + 1] == "2"
    assert found.learner.env["OMP_NUM_THREADS"] == "1"
    assert [c.name for c in found.generators] == ["generator-g0", "generator-g1", "generator-g2"]
    argv = found.generators[1].argv
    options = dict(zip(argv[3::2], argv[4::2], strict=False))
    assert (options["--name"], options["--slots"], options["--run-dir"]) == ("g1", "7", "runs/a b")
    assert argv[-1] == "--keep-kv"
    assert found.generators[1].env["OMP_NUM_THREADS"] == "2"


def test_a_dry_run_says_how_to_make_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert "`orz make-base --recipe small_1gpu` makes them" in dry_run(small_1gpu(), 1)
    assert "make-base" not in dry_run(orz_7b_8gpu(), 4)


def test_a_dry_run_is_toml_that_gives_the_same_configuration() -> None:
    text = dry_run(tiny_cpu(), 1)
    assert from_toml(text) == tiny_cpu()
    assert set(tomllib.loads(text)) == {field.name for field in dataclasses.fields(Config)}
    shown = [line for line in text.splitlines() if line.startswith("#")]
    assert sum("orz_async.generator --run-dir runs/tiny_cpu" in line for line in shown) == tiny_cpu().generator.count
    assert sum("torch.distributed.run" in line for line in shown) == 1


def test_backoff_doubles_up_to_its_bound() -> None:
    limits = Limits(backoff_s=1.0, backoff_most_s=30.0)
    assert [limits.backoff(n) for n in (1, 2, 3, 5, 6, 1000)] == [1.0, 2.0, 4.0, 16.0, 30.0, 30.0]
