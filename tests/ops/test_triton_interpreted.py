"""The Triton kernels and their GPU benchmark without a GPU: interpreted, on CPU tensors, in processes of their own.

Triton decides when it is imported whether it interprets; and a process is one thread here, so they run side by side.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARK = "benchmark"
# Two processes of about equal length: to start one costs seconds.
CASES = {"head": ("head",), "tokens": ("tokens", "logits", "adapter")}

# A minute of one core, which on a machine with much else to do is many minutes.
PATIENCE = 900
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed"),
    pytest.mark.timeout(PATIENCE + 30),
]


# A machine with torch, numpy and Triton, and a checkout that nobody installed anything else for. Hidden, not refused:
# torch asks whether some of them are there.
BARE = """
import os, sys
ABSENT = {"transformers", "safetensors", "zmq", "msgspec", "tyro", "rich", "math_verify", "prometheus_client",
          "matplotlib", "psutil", "pytest", "hypothesis", "pybind11", "liger_kernel", "cut_cross_entropy"}
class Hide:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)
    def find_distributions(self, *context):
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*context)
sys.meta_path[:] = [Hide(list(sys.meta_path))]
try:
    import msgspec
    os._exit(9)
except ModuleNotFoundError:
    pass
"""


class Run:
    """One process and what it printed."""

    def __init__(self, folder: Path, name: str, command: list[str], **extra: str) -> None:
        # From a bare checkout: nothing of ours on the path but what is named.
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "ORZ_BACKEND")}
        kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra
        self.log, self.out = folder / f"{name}.log", folder / f"{name}.json"
        line = [sys.executable, "-m", *(word.replace("OUT", str(self.out)) for word in command)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(line, cwd=ROOT, env=kept, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> tuple[int, str]:
        code = self.process.wait(timeout=PATIENCE)
        return code, self.log.read_text()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All at once, the longest first."""
    folder = tmp_path_factory.mktemp("interpreted")
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    (folder / "bare").mkdir()
    (folder / "bare" / "sitecustomize.py").write_text(BARE)
    command = ["benchmarks.run", "gpu", "--dry-run", "--out", "OUT"]
    started = {BENCHMARK: Run(folder, BENCHMARK, command, PYTHONPATH=str(folder / "bare"))}
    for name, files in CASES.items():
        command = ["pytest", "-q", "-p", "no:cacheprovider", *(f"tests/ops/interpreted/{file}.py" for file in files)]
        started[name] = Run(folder, name, command, TRITON_INTERPRET="1", PYTHONPATH=paths)
    yield started
    for run in started.values():
        run.stop()


@pytest.mark.parametrize("name", CASES)
def test_kernels_under_the_interpreter(name: str, runs: dict[str, Run]) -> None:
    code, text = runs[name].finish()
    assert code == 0, text[-8000:]
    assert " passed" in text


def test_dry_run_of_the_gpu_benchmark(runs: dict[str, Run]) -> None:
    """All of it runs on tiny tensors, so that its first run on a lent device succeeds."""
    code, text = runs[BENCHMARK].finish()
    assert code == 0, text[-8000:]
    document = json.loads(runs[BENCHMARK].out.read_text())
    assert document["problems"] == []
    names = {row["name"].split(" ")[0] for row in document["rows"]}
    assert {"ceiling", "gae", "whiten", "ppo_loss", "value_loss", "logprob", "ppo_head", "head_logprob"} <= names
    checked = [row for row in document["rows"] if row["unit"] == "error"]
    assert len(checked) > 30
    assert all(row["notes"]["passed"] for row in checked)
    assert document["ceilings"]["matmul_tflops"] > 0
    assert "liger_kernel.transformers.functional is not compared with: ModuleNotFoundError" in text


def test_a_benchmark_group_that_fails_is_reported_and_the_file_written(tmp_path: Path) -> None:
    """Without a device and without --dry-run every group fails: that is what a broken driver looks like."""
    run = Run(tmp_path, "broken", ["benchmarks.gpu_ops", "--only", "ceilings", "--out", "OUT"])
    code, text = run.finish()
    assert code == 1
    assert "expected a CUDA device, found none" in text
    assert json.loads(run.out.read_text())["problems"] == ["ceilings: ended with exit code 1"]
