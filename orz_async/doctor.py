"""`orz doctor`: can this machine train with this installation, and if not, what is to be done?

Each check looks at one thing and says what it found; it never changes anything and asks no network.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "fail"]
_GB = 1 << 30
_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """note: something works less well, or is not there and not needed by everybody; fail: training will not work."""

    name: str
    state: State
    found: str
    advice: str = ""


def check_python() -> Iterator[Finding]:
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 14):
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "fail", version, "use Python 3.11 to 3.13")


def check_packages() -> Iterator[Finding]:
    """The requirements of the installed distribution against what is installed."""
    try:
        wanted = metadata.requires("orz_async") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "note", "running from a folder, not installed", "pip install -e . checks versions")
        return
    from packaging.requirements import Requirement

    wrong = []
    requirements = [Requirement(text) for text in wanted]
    for requirement in (r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "pip install the versions wanted, or pip install -e .")
    else:
        yield Finding("packages", "ok", "all requirements met")


def check_extension() -> Iterator[Finding]:
    if importlib.util.find_spec("orz_async._C") is None:
        yield Finding("C++ core", "note", "not built: slower reference code is used", "make dev, needs g++ and cmake")
        return
    try:
        importlib.import_module("orz_async._C")
    except ImportError as error:
        yield Finding("C++ core", "fail", str(error), "make clean dev builds it for this Python")
    else:
        yield Finding("C++ core", "ok", "loads")


def check_torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "fail", str(error), "pip install torch")
        return
    built = torch.version.cuda
    yield Finding("torch", "ok", f"{torch.__version__}, {'CUDA ' + built if built else 'CPU only'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            free, _ = torch.cuda.mem_get_info(index)
            memory = f"{about.total_memory / _GB:.0f} GB ({free / _GB:.0f} free)"
            found = f"{about.name}, {memory}, sm_{about.major}{about.minor}"
            old = (about.major, about.minor) < (8, 0)
            yield Finding(
                f"GPU {index}", "note" if old else "ok", found, "bfloat16 is slow before sm_80" if old else ""
            )
    elif shutil.which("nvidia-smi") and built is None:
        yield Finding("GPU", "fail", "a GPU, but a torch without CUDA", "install the CUDA build of torch")
    elif built is not None:
        yield Finding(
            "GPU", "fail" if _driver() else "note", _driver() or "none", "the driver must be new enough for it"
        )
    else:
        yield Finding("GPU", "note", "none: policy and critic run on the CPU", "fine for the recipe tiny_cpu")


def _driver() -> str:
    """What nvidia-smi says of the driver; empty without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().replace("\n", "; ")


def check_backends() -> Iterator[Finding]:
    try:
        from orz_async.ops.backend import MODULES
    except ImportError as error:
        yield Finding("numeric ops", "fail", str(error), "pip install -e .")
        return
    for name, module in MODULES.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            found = str(error).splitlines()[0]
            yield Finding(f"backend {name}", "note", f"not here: {found}", "needed on a GPU only" * (name != "cpu"))
        else:
            yield Finding(f"backend {name}", "ok", "loads")


def check_vllm() -> Iterator[Finding]:
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        yield Finding("vLLM", "note", "not installed", "pip install 'orz_async[vllm]' for generator.engine = \"vllm\"")
        return
    major_minor = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    good = (0, 27) <= major_minor < (0, 33)
    yield Finding("vLLM", "ok" if good else "fail", version, "" if good else "install 0.27 to 0.32")


def check_ports() -> Iterator[Finding]:
    try:
        with socket.socket() as listener, socket.socket() as caller:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            caller.settimeout(5)
            caller.connect(listener.getsockname())
    except OSError as error:
        yield Finding("ports", "fail", f"loopback: {error}", "learner and generators talk over 127.0.0.1: allow it")
    else:
        yield Finding("ports", "ok", "loopback connects")


def check_limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 4096 and files != resource.RLIM_INFINITY:
        yield Finding("open files", "note", f"{files} allowed", "ulimit -n 65536 for runs with many generators")
    else:
        yield Finding("open files", "ok", f"{files} allowed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    few = cores < 2
    yield Finding("cores", "note" if few else "ok", str(cores), "learner and generator will take turns" if few else "")
    if (memory := _memory()) is not None:
        small = memory < 4 * _GB
        yield Finding("memory", "note" if small else "ok", f"{memory / _GB:.1f} GB free", "4 GB for the demo" * small)
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < _GB:
        yield Finding(
            "/dev/shm", "note", f"{free / _GB:.2f} GB", "NCCL and vLLM want some GB: --shm-size in a container"
        )
    free = shutil.disk_usage(".").free
    state: State = "fail" if free < _GB else "note" if free < 20 * _GB else "ok"
    yield Finding("disk", state, f"{free / _GB:.0f} GB free here", "" if state == "ok" else "journal.max_mb is 20 GB")


def _memory() -> int | None:
    """Bytes that can still be had, the limit of a container included."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(available, int(text)) if text.isdigit() else available


def check_sandbox() -> Iterator[Finding]:
    """What confines the processes that compare answers, which are hostile input."""
    if importlib.util.find_spec("math_verify") is None:
        yield Finding("verifier", "fail", "math-verify is missing", "pip install math-verify")
        return
    levels = ["own process", "CPU, memory and file limits"] if sys.platform == "linux" else ["own process"]
    quiet = _unprivileged_namespaces()
    found = f"{', '.join(levels)}; user namespaces {'allowed' if quiet else 'not allowed'} here"
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    yield Finding("sandbox", "note" if root else "ok", found, "run as an ordinary user if you can" * root)


def _unprivileged_namespaces() -> bool:
    try:
        done = subprocess.run(["unshare", "-Ur", "true"], capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(check_python, check_packages, check_extension, check_torch, check_backends),
    *(check_vllm, check_ports, check_limits, check_sandbox),
)


def examine() -> list[Finding]:
    """All findings, in order."""
    return [finding for check in CHECKS for finding in check()]
