"""The demo with vLLM daemons, one of which is killed and one of which comes late: accuracy, and what it cost.

`python -m benchmarks.vllm_demo --python .venv-vllm/bin/python`. Two daemons start with the run. At a third of the steps
the first is killed with SIGKILL and not started again by the launcher for a while, as that gives it its usual pause; a
third one is started by hand at once. The run must end, with every rollout accounted for.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 1500.0


def events(run: Path, process: str) -> list[dict[str, Any]]:
    path = run / "events" / f"{process}.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    """Until the learner has done this step; RuntimeError if the run ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(one["kind"] == "step" and one["step"] >= step for one in events(run, "learner-0")):
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run ended with {launcher.poll()}, or hangs, before step {step}")
        time.sleep(0.5)


def disturb(run: Path, python: str, at_step: int, launcher: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Kill the first daemon, start a third."""
    wait_for_step(run, at_step, launcher)
    pid = next(one["pid"] for one in reversed(events(run, "generator-g0")) if one["kind"] == "process")
    os.kill(pid, signal.SIGKILL)
    print(f"step {at_step}: killed g0 (pid {pid}); starting late-1", flush=True)
    argv = [python, "-m", "orz_async.generator", "--run-dir", str(run), "--name", "late-1", "--engine", "vllm"]
    with (run / "logs" / "late-1.log").open("wb") as log:
        return subprocess.Popen([*argv, "--slots", "64", "--queue", "64"], stdout=log, stderr=log)


def report(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    names = ("accuracy_before", "accuracy_after", "length_after", "train_wall_s", "rollouts", "max_lag_observed")
    found = {name: summary.get(name) for name in names}
    found |= {name: value for name, value in summary.items() if "mismatch" in name}
    rollouts, swaps = {}, {}
    for path in sorted((run / "events").glob("generator-*.jsonl")):
        seen = events(run, path.stem)
        rollouts[path.stem] = sum(1 for one in seen if one["kind"] == "throughput" and one["tokens_s"] > 0)
        swaps[path.stem] = [one for one in seen if one["kind"] == "weights"]
    found["seconds_generating"] = rollouts
    for name in ("transfer_s", "pause_s", "drain_s", "load_s"):
        values = sorted(one[name] for all_of_it in swaps.values() for one in all_of_it if name in one)
        found[name] = {"median": values[len(values) // 2], "max": values[-1], "n": len(values)} if values else None
    return found


def command_line(arguments: list[str]) -> str:
    """What was called, without the absolute paths of a machine."""
    words = [Path(word).name if word.startswith("/") else word for word in arguments]
    return shlex.join(["python", "-m", "benchmarks.vllm_demo", *words])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_demo", description=__doc__)
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/vllm_demo"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--calm", action="store_true", help="kill nothing, add nothing")
    parser.add_argument("--out", type=Path, help="write the report there as JSON")
    options, extra = parser.parse_known_args()
    argv = [
        sys.executable,
        "-m",
        "orz_async.cli",
        "demo",
        "--run-dir",
        str(options.run_dir),
        "--steps",
        str(options.steps),
    ]
    argv += ["--generator.engine", "vllm", "--generator.python", options.python, *extra]
    # What an earlier run there said of its processes must not be read as this one's: a process is killed for it.
    shutil.rmtree(options.run_dir / "events", ignore_errors=True)
    launcher = subprocess.Popen(argv)
    late = None
    try:
        if not options.calm:
            late = disturb(options.run_dir, options.python, options.steps // 3, launcher)
        code = launcher.wait(PATIENCE_S)
        found = report(options.run_dir) | {
            "exit_code": code,
            "command": command_line(sys.argv[1:]),
        }
        if late is not None:
            found["late_exit_code"] = late.wait(60.0)
    finally:
        for process in (launcher, late):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(60.0)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
