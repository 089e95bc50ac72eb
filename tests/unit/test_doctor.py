"""The doctor finds what is broken, says what to do, and the starting files run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orz_async import doctor
from orz_async.cli import dispatch
from orz_async.cli_config import parse_config
from orz_async.data.files import read_problems
from orz_async.doctor import Finding
from orz_async.errors import ConfigError, ExitCode


def test_this_installation_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    findings = {finding.name: finding for finding in doctor.examine()}
    assert {"python", "torch", "C++ core", "backend cpu", "ports", "disk", "sandbox"} <= findings.keys()
    assert findings["backend reference"].state == findings["ports"].state == "ok"
    assert all(finding.advice for finding in findings.values() if finding.state == "fail")


def test_what_is_broken_ends_with_a_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("loopback", "fail", "refused", "allow it")

    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    assert dispatch(["doctor"]) == ExitCode.CONFIG
    out = capsys.readouterr().out
    assert "allow it" in out and "to be mended: loopback" in out


def test_a_port_that_cannot_be_had_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr("socket.socket.bind", refuse)
    [finding] = doctor.check_ports()
    assert finding.state == "fail" and "127.0.0.1" in finding.advice


def test_the_starter_is_a_valid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / 'a "model"'
    model.mkdir()
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    assert dispatch(["init", "mine", "--model", str(model)]) == 0
    config = parse_config(["mine/recipe.toml"])
    assert (config.run_dir, config.data.template, config.model.path) == ("runs/mine", "chat", str(model))
    train, heldout = read_problems(config.data.train), read_problems(config.data.heldout)
    assert len(train) >= config.broker.prompts_per_step and not {p.text for p in train} & {p.text for p in heldout}
    with pytest.raises(ConfigError, match=r"recipe\.toml"):
        dispatch(["init", "mine"])
