"""Every GPU op: built, checked against float64, timed beside its peers, held against ceilings measured in the same run.

    python -m benchmarks.gpu_ops --out FILE      on a machine with a CUDA device; a checkout need not be installed
    python -m benchmarks.gpu_ops --dry-run       tiny shapes on the CPU under Triton's interpreter: does it all run?

Each group of ops is a process of its own with a time limit: a kernel that hangs, or that leaves the device unusable,
costs what is left of its group and nothing else. The exit code is 1 if something failed or was over its cap; the result
file has what was measured all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.protocol import RESULTS, Row, commit, save

ROOT = Path(__file__).resolve().parents[1]
# Seconds each group may take, in the order they run; together under eight minutes.
GROUPS = {"ceilings": 40, "tokens": 90, "logits": 80, "head": 150, "peers": 105}
MODULES = ("benchmarks.gpu_tokens", "benchmarks.gpu_head", "benchmarks.gpu_peers")


def measure(group: str, dry: bool, seconds: float, ceilings: dict[str, float], out: Path) -> None:
    """Run one group in this process; `out` holds all that is known so far, whatever comes next."""
    if dry:
        # Before Triton is imported: it decides then.
        os.environ["TRITON_INTERPRET"] = "1"
    for folder in (str(ROOT / "kernels"), str(ROOT)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    import torch

    from benchmarks.gpu_measure import NOT_RUN, Bench

    torch.manual_seed(0)
    if not dry and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_ops: expected a CUDA device, found none; --dry-run runs on the CPU")
    bench = Bench(
        dry, time.monotonic() + seconds, ceilings.get("matmul_tflops", math.nan), ceilings.get("copy_tbs", math.nan)
    )
    device = "dry run" if dry else torch.cuda.get_device_name()

    def keep() -> None:
        found = {"matmul_tflops": bench.matmul_tflops, "copy_tbs": bench.copy_tbs}
        part = {"rows": bench.rows, "problems": bench.problems, "ceilings": found, "device": device}
        out.with_suffix(".new").write_text(json.dumps(part))
        out.with_suffix(".new").replace(out)

    bench.keep = keep
    for module in MODULES:
        for section in importlib.import_module(module).SECTIONS.get(group, ()):
            print(f"-- {section.__name__}", flush=True)
            if bench.late():
                bench.problem(section.__name__, NOT_RUN)
                continue
            with bench.guarded(section.__name__):
                section(bench)
                bench.forget()
            keep()


def software() -> dict[str, str]:
    """What decides the figures, beside the device."""
    from importlib import metadata

    found = {}
    for package in ("torch", "triton", "liger_kernel", "cut_cross_entropy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    for name, command in (
        ("driver", ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]),
        ("nvcc", ["nvcc", "--version"]),
    ):
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            text = ""
        found[name] = text.splitlines()[-1] if text else "absent"
    return found


def in_process_of_its_own(group: str, dry: bool, limit: float, ceilings: dict[str, float]) -> dict[str, Any]:
    """Run a group as a child; what went wrong with the child becomes a problem in the result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu_ops", "--group", group, "--out", str(out)]
        command += ["--seconds", str(max(limit - 15, 5)), "--ceilings", json.dumps(ceilings)]
        # A session of its own: torch.compile has workers, and they end with it.
        child = subprocess.Popen([*command, *(["--dry-run"] if dry else [])], cwd=ROOT, start_new_session=True)
        trouble = waited_for(child, limit)
        part: dict[str, Any] = {"rows": [], "problems": [], "ceilings": {}, "device": "unknown"}
        if out.exists():
            part = json.loads(out.read_text())
        elif not trouble:
            trouble = "left no result"
    part["problems"] += [f"{group}: {trouble}"] if trouble else []
    return part


def waited_for(child: subprocess.Popen[bytes], limit: float) -> str:
    """What is to be said about its end; nothing if it was a good one."""
    try:
        code = child.wait(timeout=limit)
        trouble = f"ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        trouble = f"did not end within {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    # A process that a broken driver holds cannot be killed; nobody waits for it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=5)
    return trouble


def run(out: Path | None, dry: bool = False, groups: tuple[str, ...] = tuple(GROUPS)) -> int:
    """All groups, the table of problems, the result file. Returns the number of problems."""
    # So that a child is ended also when this process is told to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    rows: list[Row] = []
    problems: list[str] = []
    ceilings: dict[str, float] = {}
    device = "unknown"
    for group in groups:
        left = sum(GROUPS.values()) - (time.monotonic() - started)
        print(f"== {group}", flush=True)
        # Time that earlier groups left over is for whoever needs it.
        later = sum(GROUPS[g] for g in groups[groups.index(group) + 1 :])
        part = in_process_of_its_own(group, dry, max(left - later, GROUPS[group] if dry else 20), ceilings)
        rows += part["rows"]
        problems += part["problems"]
        if group == "ceilings":
            ceilings = {k: v for k, v in part["ceilings"].items() if math.isfinite(v)}
        device = part["device"] if part["device"] != "unknown" else device
    path = save("gpu", rows, device=device, out=out)
    document = json.loads(path.read_text())
    document |= {"software": software(), "ceilings": ceilings, "problems": problems, "commit": commit()}
    path.write_text(json.dumps(document, indent=1) + "\n")
    for problem in problems:
        print(f"PROBLEM {problem.splitlines()[0]} ... {problem.splitlines()[-1]}")
    print(f"{len(rows)} rows, {len(problems)} problems, {time.monotonic() - started:.0f} s: {path}")
    return len(problems)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help=f"result file; default {RESULTS.name}/gpu_DEVICE_DATE.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, Triton interpreted")
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS), help="groups to run")
    parser.add_argument("--group", choices=list(GROUPS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group:
        measure(options.group, options.dry_run, options.seconds, options.ceilings, options.out)
        return 0
    return 1 if run(options.out, options.dry_run, tuple(options.only)) else 0


if __name__ == "__main__":
    sys.exit(main())
