"""How everything here is measured: warm-up, variants interleaved, medians and spread, and the ratio pair by pair.

Machines are noisy, so a claim is a ratio between variants measured in turn within one run, never an absolute time.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def interleave(
    name: str, variants: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1, calls: int = 1
) -> list[Row]:
    """Milliseconds of each variant, A B C A B C ..., and the ratio of each to the first one, turn by turn.

    `calls` is how many calls of the thing measured one variant function makes; times are per call.
    """
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant, run in variants.items():
            started = time.perf_counter()
            run()
            times[variant].append((time.perf_counter() - started) * 1e3 / calls)
    first = next(iter(times.values()))
    return [
        row(name, variant, "ms", values)
        | {"ratio_to_first": statistics.median(v / f for v, f in zip(values, first, strict=True))}
        for variant, values in times.items()
    ]


def row(name: str, variant: str, unit: str, values: list[float], **notes: Any) -> Row:
    """One line of a result file."""
    return {
        "name": name,
        "variant": variant,
        "unit": unit,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
        "notes": notes,
    }


def commit() -> str:
    """The commit measured, with a + when the tree has changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's own name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def save(suite: str, rows: list[Row], *, device: str, out: Path | None = None, module: str = "benchmarks.run") -> Path:
    """Write a result file: device, versions, commit, command (of this module), rows."""
    from orz_async.observe.versions import versions

    slug = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    while "--" in slug:
        slug = slug.replace("--", "-")
    path = out or RESULTS / f"{suite}_{slug}_{time.strftime('%Y-%m-%d')}.json"
    document = {
        "schema": 1,
        "suite": suite,
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        # The name of the file alone: where somebody keeps it says nothing about the measurement.
        "command": " ".join([f"python -m {module}", *(w if w != str(out) else path.name for w in sys.argv[1:])]),
        "versions": versions(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'benchmark':<34} {'variant':<30} {'median':>11} {'min':>11} {'max':>11} unit   ratio"]
    for r in rows:
        ratio = f"{r['ratio_to_first']:.3f}" if "ratio_to_first" in r else ""
        lines.append(
            f"{r['name']:<34} {r['variant']:<30} {r['median']:>11.4g} {r['min']:>11.4g} {r['max']:>11.4g}"
            f" {r['unit']:<6} {ratio}"
        )
    return "\n".join(lines)
