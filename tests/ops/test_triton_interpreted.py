"""The Triton kernels against float64 on CPU tensors: each file of `interpreted/` in a process that interprets them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("head", "tokens", "logits", "adapter")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """All at once: each is one thread."""
    folder = tmp_path_factory.mktemp("interpreted")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "ORZ_BACKEND": "auto"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    started = {}
    for name in FILES:
        log = folder / f"{name}.log"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/interpreted/{name}.py"]
        with log.open("wb") as out:
            started[name] = (
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT),
                log,
            )
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str, runs: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, log = runs[name]
    code = process.wait(timeout=280)
    text = log.read_text()
    assert code == 0, text[-8000:]
    assert " passed" in text
