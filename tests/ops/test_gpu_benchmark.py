"""The GPU benchmark without a GPU: all of it runs on tiny tensors, so that its first run on a lent device succeeds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


def run(out: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """From a bare checkout: nothing of ours on the path but the working directory."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "benchmarks.gpu_ops", "--out", str(out), *arguments]
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment, check=False)


def test_dry_run(tmp_path: Path) -> None:
    done = run(tmp_path / "out.json", "--dry-run")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["problems"] == []
    names = {row["name"].split(" ")[0] for row in document["rows"]}
    assert {"ceiling", "gae", "whiten", "ppo_loss", "value_loss", "logprob", "ppo_head", "head_logprob"} <= names
    checked = [row for row in document["rows"] if row["unit"] == "error"]
    assert len(checked) > 30
    assert all(row["notes"]["passed"] for row in checked)
    assert document["ceilings"]["matmul_tflops"] > 0


def test_a_group_that_fails_is_reported_and_the_file_written(tmp_path: Path) -> None:
    """Without a device and without --dry-run, every group fails: that is what a broken driver looks like."""
    done = run(tmp_path / "out.json", "--only", "ceilings")
    assert done.returncode == 1
    assert "expected a CUDA device, found none" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["problems"] == ["ceilings: ended with exit code 1"]
