"""The recipe for one GPU, cut down to a CPU: the same base-maker and the same command, smaller in each dimension."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from orz_async.learner.base import make_base
from orz_async.learner.base_plan import SMALL
from tests.e2e.conftest import PATIENCE_S, ROOT


def test_base_and_run_of_the_gpu_recipe_on_a_cpu(tmp_path: Path) -> None:
    plan = dataclasses.replace(SMALL, hidden=128, intermediate=128, layers=2, heads=2, batch=8, heldout_problems=20)
    base, run = tmp_path / "base", tmp_path / "run"
    made = make_base(base, plan=plan, seed=1, steps=40, dtype="bfloat16")
    assert made["plan"] == "small" and made["heldout"]["samples"] == 20
    settings = {
        "run-dir": run,
        "steps": 2,
        "model.path": base / "model",
        "data.train": base / "train.jsonl",
        "data.heldout": base / "heldout.jsonl",
        "sampling.max-new-tokens": 32,
        "broker.prompts-per-step": 4,
        "broker.samples-per-prompt": 4,
        "generator.device": "cpu",
        "generator.slots": 16,
        "generator.verifiers": 1,
        "learner.max-tokens": 1024,
        "eval.prompts": 8,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "orz_async.cli", "run", "small_1gpu", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    events = [json.loads(line) for line in (run / "events" / "learner-0.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [0, 1]
    assert all(event["rollouts"] == 16 and event["mismatch_max"] < 0.5 for event in steps), "bfloat16 on both sides"
    assert {event["version"] for event in events if event["kind"] == "eval"} == {0, 2}
    assert (run / "export" / "model.safetensors").exists()
