"""What is built: a wheel that works where nothing of the checkout is, and ORZ_CUDA=AUTO|ON|OFF. `make wheel-check`."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("orz_async", "kernels", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md")

# Half a minute of one core each; much more where others work too.
PATIENCE = 900
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]


def run(*command: str | Path, cwd: Path = Path("/"), **extra: str) -> subprocess.CompletedProcess[str]:
    """In a folder without the package, with nothing of the checkout on the path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ORZ_BACKEND", "CUDACXX", "CUDA_PATH")}
    line = [str(word) for word in command]
    return subprocess.run(
        line, cwd=cwd, env=kept | extra, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, so that nothing built before is used or touched: CMake remembers the compilers it found."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def without_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with every program of this one but nvcc."""
    folder = tmp_path_factory.mktemp("bin")
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name != "nvcc" and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    return str(folder)


def wheel(source: Path, out: Path, **extra: str) -> Path:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = run(*command, **extra)
    assert done.returncode == 0, done.stderr[-4000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    taken = time.monotonic() - started
    settings = f"ORZ_CUDA={extra.get('ORZ_CUDA', 'AUTO')}"
    print(f"\nwheel with {settings}: {taken:.1f} s, {worked:.1f} s of processor time, {os.cpu_count()} cores")
    return next(out.glob("*.whl"))


def test_a_wheel_works_in_an_empty_environment(source: Path, tmp_path: Path) -> None:
    """First with nothing else installed: the extension needs neither torch nor numpy. Then with what it depends on."""
    made = wheel(source, tmp_path / "wheel")
    names = zipfile.ZipFile(made).namelist()
    assert any(name.startswith("orz_async/_C.") and name.endswith(".so") for name in names)
    assert ("orz_async/liborz_cuda.so" in names) == (shutil.which("nvcc") is not None)
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", made)
    assert done.returncode == 0, done.stderr
    alone = "import sys, orz_async._C as core; assert core.crc32c(b'123456789') == 0xE3069283; print(core.__file__)"
    done = run(python, "-c", alone)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout

    # A .pth only adds a folder to the path; the editable install that may be in it stays asleep.
    site = next((tmp_path / "empty" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    everything = (
        "import pkgutil, importlib, orz_async, torch\n"
        "names = [m.name for m in pkgutil.walk_packages(orz_async.__path__, 'orz_async.')]\n"
        "for name in names:\n"
        "    # What starts something, what needs another package or a GPU, and a library that is no Python module.\n"
        "    if not any(word in name for word in ('__main__', 'vllm', 'ops.cuda', 'liborz_cuda')):\n"
        "        importlib.import_module(name)\n"
        "from orz_async import ops\n"
        "x = torch.ones(5)\n"
        "a, _ = ops.gae(x, x, torch.tensor([0, 5], dtype=torch.int32), gamma=1.0, lam=1.0)\n"
        "assert a.tolist() == [4, 3, 2, 1, 0], a\n"
        "from orz_async.ops import backend\n"
        "assert backend.selected().cpu.__name__ == 'orz_async.ops.cpu'\n"
        "print(len(names), orz_async.__file__)\n"
    )
    done = run(python, "-c", everything)
    assert done.returncode == 0, done.stderr[-4000:]
    assert str(tmp_path) in done.stdout
    assert int(done.stdout.split()[0]) > 50
    done = run(tmp_path / "empty" / "bin" / "orz", "--help")
    assert done.returncode == 0, done.stderr[-4000:]


def test_off_builds_no_gpu_kernels(source: Path, tmp_path: Path) -> None:
    """Also where a library from before lies about."""
    stale = source / "build" / f"lib.{sysconfig.get_platform()}-cpython-{sys.version_info[0]}{sys.version_info[1]}"
    (stale / "orz_async").mkdir(parents=True)
    (stale / "orz_async" / "liborz_cuda.so").touch()
    assert "orz_async/liborz_cuda.so" not in zipfile.ZipFile(wheel(source, tmp_path, ORZ_CUDA="OFF")).namelist()


def test_auto_without_nvcc_goes_without_gpu_kernels(source: Path, tmp_path: Path, without_nvcc: str) -> None:
    names = zipfile.ZipFile(wheel(source, tmp_path, ORZ_CUDA="AUTO", PATH=without_nvcc)).namelist()
    assert "orz_async/liborz_cuda.so" not in names


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [("ON", "ORZ_CUDA=ON: expected an nvcc on PATH or in CUDACXX, found none"), ("YES", "expected AUTO, ON or OFF")],
)
def test_on_without_nvcc_stops_with_a_sentence(
    source: Path, tmp_path: Path, without_nvcc: str, setting: str, sentence: str
) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    done = run(*command, cwd=source, ORZ_CUDA=setting, PATH=without_nvcc)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert sentence in said, said[-3000:]
    assert "Traceback" not in said
