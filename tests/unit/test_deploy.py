"""The multi-node files parse, and every option they give to our processes exists."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from orz_async.generator.__main__ import parser

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPTS = sorted([*DEPLOY.glob("*.sh"), *DEPLOY.glob("*.sbatch")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert "set -euo pipefail" in text


def known() -> set[str]:
    return {option for action in parser()._actions for option in action.option_strings}


def test_generators_are_given_options_they_have() -> None:
    text = (DEPLOY / "generators.sbatch").read_text().partition("orz_async.generator")[2]
    assert set(re.findall(r"--[a-z-]+", text)) <= known()
    jobset = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    learner, generator = jobset["spec"]["replicatedJobs"]
    [container] = generator["template"]["spec"]["template"]["spec"]["containers"]
    assert {word for word in container["args"] if word.startswith("--")} <= known()
    spec = learner["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    nodes = next(int(e["value"]) for e in container["env"] if e["name"] == "NODES")
    assert spec["parallelism"] == spec["completions"] == nodes
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    config = next(e["value"] for e in container["env"] if e["name"] == "CONFIG")
    assert any(config.startswith(mount) for mount in mounts)


def test_torchrun_starts_the_learner_on_every_node(tmp_path: Path) -> None:
    """A stand-in for python prints what it is called with."""
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s " "$@"\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "2", "HEAD": "n0", "CONFIG": "tiny_cpu", "GPUS": "1"}
    done = subprocess.run(
        ["bash", str(DEPLOY / "torchrun.sh"), "--steps", "3"], env=env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint n0:29500" in done.stdout
    assert done.stdout.strip().endswith("-m orz_async.learner tiny_cpu --steps 3")
    missing = subprocess.run(
        ["bash", str(DEPLOY / "torchrun.sh")], env={"PATH": env["PATH"]}, capture_output=True, text=True, timeout=30
    )
    assert missing.returncode != 0
    assert "number of learner nodes" in missing.stderr
