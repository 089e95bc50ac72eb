"""The arithmetic of the end-to-end suite, from runs that are made up."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import e2e
from benchmarks.e2e import STRICT, Job, Outcome, jobs, rows_of, work
from benchmarks.e2e_times import Times, of_limit, overlap_limit, read_events, time_to, times


def step(t: float, *, lag: int = 0, rollouts: int = 10, tokens: int = 200, **seconds: float) -> dict[str, Any]:
    fields = {"kind": "step", "t": t, "rollouts": rollouts, "tokens_trained": tokens, "lag_max": lag}
    return fields | {"seconds": seconds, "step_s": sum(seconds.values())}


def timeline(t: float, **seconds: float) -> dict[str, Any]:
    return {"kind": "timeline", "t": t, "seconds": seconds}


def synchronous(generate_s: float, learn_s: float) -> Times:
    events = [step(100.0, policy=50.0)]
    for _ in range(3):
        events.append(step(events[-1]["t"] + generate_s + learn_s, wait_rollouts=generate_s, policy=learn_s))
    return times({"learner-0": events}, skip=1)


@pytest.mark.parametrize(
    ("generate_s", "learn_s", "limit"), [(1.0, 1.0, 2.0), (0.0, 2.0, 1.0), (1.0, 3.0, 4 / 3), (3.0, 1.0, 4 / 3)]
)
def test_limit_of_overlap(generate_s: float, learn_s: float, limit: float) -> None:
    assert overlap_limit(generate_s, learn_s) == pytest.approx(limit)
    if generate_s:
        made = synchronous(generate_s, learn_s)
        assert made.limit == pytest.approx(limit)
        assert made.bottleneck == ("generator" if generate_s > learn_s else "learner")


@pytest.mark.parametrize(("generate_s", "learn_s"), [(0.0, 0.0), (-1.0, 2.0), (1.0, float("nan"))])
def test_limit_needs_times(generate_s: float, learn_s: float) -> None:
    with pytest.raises(ValueError, match="expected two times"):
        overlap_limit(generate_s, learn_s)


def test_part_of_the_limit() -> None:
    """3 s generating and 5 s learning: overlap can bring 1.6; steps of 6 s instead of 8 s are 1.33, five sixths."""
    overlapped = times({"learner-0": [step(0.0, policy=1.0), step(6.0, wait_rollouts=0.5, policy=5.5)]}, skip=1)
    assert of_limit(synchronous(3.0, 5.0), overlapped) == pytest.approx(8 / 6 / 1.6)


def test_times_leave_the_first_steps_out() -> None:
    learner = [
        step(100.0, policy=90.0),
        step(102.0, lag=3, wait_rollouts=1.0, policy=1.0),
        {"kind": "eval", "t": 102.5},
        step(104.0, lag=1, wait_rollouts=0.5, policy=1.0, critic=0.5),
        step(106.0, lag=2, wait_rollouts=0.1, rollouts=30, policy=1.4, critic=0.5),
    ]
    # Half of the second stretch lies before the steps that count, and half of the last one behind them.
    busy = [timeline(101.0, wait_leases=50.0), timeline(103.0, wait_leases=1.0, generate=1.0)]
    idle = [timeline(108.0, wait_weights=3.0, generate=3.0)]
    made = times({"learner-0": learner, "generator-g0": busy, "generator-g1": idle}, skip=2)
    assert (made.step_s, made.rollouts_s, made.tokens_s, made.length) == (2.0, 10.0, 100.0, 10.0)
    assert made.wait_s == pytest.approx(0.3)
    assert made.learn_s == pytest.approx(1.7)
    assert made.max_lag == 2
    assert made.learner_s == pytest.approx({"wait_rollouts": 0.3, "policy": 1.2, "critic": 0.5})
    assert made.learner_idle == pytest.approx({"rollouts": 0.15})
    assert made.generator_s == pytest.approx({"wait_leases": 0.125, "generate": 0.625, "wait_weights": 0.5})
    # g0 is counted for 1 s (half of it waiting), g1 for 4 s (half of it waiting).
    assert made.generator_idle == pytest.approx({"leases": 0.1, "weights": 0.4})
    assert made.idle_of("learner") == pytest.approx(0.15)
    assert made.idle_of("generator") == pytest.approx(0.5)


@pytest.mark.parametrize("skip", [0, 2, 3])
def test_times_need_steps(skip: int) -> None:
    with pytest.raises(ValueError, match="found 2 steps in all"):
        times({"learner-0": [step(1.0, policy=1.0), step(2.0, policy=1.0)]}, skip=skip)


def test_events_of_a_run_without_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "learner-0.jsonl").write_text('{"kind":"run","t":1}\n{"kind":"step","t"')
    assert read_events(tmp_path) == {"learner-0": [{"kind": "run", "t": 1}]}


def test_time_to_an_accuracy_is_that_of_the_first_evaluation_with_it() -> None:
    evaluations = [{"wall_s": s, "accuracy": a} for s, a in [(1.0, 0.2), (5.0, 0.9), (9.0, 0.85), (12.0, 0.95)]]
    assert time_to(0.9, evaluations) == 5.0
    assert time_to(0.91, evaluations) == 12.0
    assert time_to(0.99, evaluations) is None
    assert time_to(0.1, []) is None


def test_every_combination_is_asked_for() -> None:
    names = [job.name for job in jobs(Path("python"))]
    assert len(names) == len(set(names))
    for lag in (0, 1, 2, 4):
        assert f"overlap, S = {lag}" in names and f"accuracy, S = {lag}" in names
        assert all(f"embedded, S = {lag}, {count} generators" in names for count in (1, 2, 3))
    assert {"vllm, S = 0, 1 generator", "vllm, S = 1, 1 generator", f"overlap, {STRICT}"} <= set(names)
    assert f"overlap, {STRICT}, turn 2" in names
    assert not any(job.missing for job in jobs(Path("python")))


def test_whole_bursts_are_counted() -> None:
    for lag in (0, 1, 2, 4):
        counted = e2e.STEPS - e2e.skipped(lag)
        assert counted % (lag + 1) == 0 and counted >= 9
        assert e2e.skipped(lag) >= e2e.SKIP


def test_without_vllm_its_rows_are_named_and_not_run() -> None:
    chosen = [job for job in jobs(None) if job.part == "vllm"]
    outcome = work(chosen, lambda job, outcome: pytest.fail(f"{job.name} was run"), lambda: 0.0)
    assert list(outcome.missing) == [job.name for job in chosen] != []
    assert all("--vllm" in reason for reason in outcome.missing.values())


def test_a_budget_that_ends_takes_the_last_ones_and_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e, "BUDGET_S", 100.0)
    now, done = 0.0, []

    def do(job: Job, outcome: Outcome) -> None:
        nonlocal now
        now += 45.0 if job.part == "slow" else 5.0
        done.append(job.name)
        if job.variant == "broken":
            raise RuntimeError("it ended with 7")

    parts = [("slow", "a"), ("slow", "b"), ("slow", "c"), ("quick", "broken"), ("quick", "d"), ("quick", "e")]
    outcome = work([Job(part, variant, 0, ()) for part, variant in parts], do, lambda: now)
    assert done == ["slow, a", "slow, b", "quick, broken", "quick, d"]
    assert outcome.missing == {
        "slow, c": "no time left of 100 s",
        "quick, broken": "it ended with 7",
        "quick, e": "no time left of 100 s",
    }


needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 or shutil.which("taskset") is None, reason="needs two cores and taskset"
)


@needs_two_cores
def test_each_side_has_a_core_of_its_own(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    prefix, (name, python) = e2e.Runs(tmp_path)._placement()
    assert name == "--generator.python"
    tell = ["-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    for argv, core in (([*prefix, sys.executable, *tell], cores[-1]), ([*prefix, python, *tell], cores[0])):
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == str([core])


@needs_two_cores
def test_cores_are_compared_by_work_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(e2e._products(0.05, 2)) == 2 and min(e2e._products(0.05, 2)) > 0
    monkeypatch.setattr(e2e, "_products", lambda seconds, processes: [100.0] if processes == 1 else [90.0, 80.0])
    [made] = e2e.cores(repeats=3)
    assert (made["median"], made["n"], made["unit"]) == (0.8, 3, "ratio")


def test_a_run_that_never_learns_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluations = [{"wall_s": 3.0, "accuracy": 0.5}, {"wall_s": 6.0, "accuracy": 0.9}]

    def one_run(folder: Path, lag: int, extra: tuple[str, ...], prefix: tuple[str, ...]) -> dict[str, Any]:
        folder.mkdir()
        return {"evals": evaluations[: 1 + lag]}

    monkeypatch.setattr(e2e, "one_run", one_run)
    chosen = [job for job in jobs(None) if job.part == "accuracy"][:2]
    outcome = work(chosen, e2e.Runs(tmp_path).do, lambda: 0.0)
    assert outcome.seconds == {"S = 0": None, "S = 1": 6.0}
    assert outcome.missing == {"accuracy, S = 0": "90% was not reached within 28 steps; best 0.5"}
    assert list(tmp_path.iterdir()) == []


def test_rows_pair_the_turns_and_name_what_is_missing() -> None:
    strict = [synchronous(1.0, 1.0), synchronous(1.0, 3.0)]
    # The step of the overlapped runs: 1.0 s of 2 s (all of the limit), then 4.0 s of 4 s (nothing of it).
    overlapped = [
        dataclasses.replace(sync, rollouts_s=10 / step_s, learner_idle={"rollouts": idle})
        for sync, step_s, idle in zip(strict, (1.0, 4.0), (0.0, 0.5), strict=True)
    ]
    outcome = Outcome(
        {("overlap", STRICT): strict, ("overlap", "S = 1"): overlapped, ("embedded", "S = 0, 1 generators"): strict},
        {"S = 0": 12.5, "S = 1": None},
        {"accuracy, S = 1": "not reached"},
    )
    rows = {(r["name"], r["variant"], r["unit"]): r for r in rows_of(outcome)}
    reached = rows["e2e part of the limit", "S = 1", "ratio"]
    assert (reached["max"], reached["min"], reached["n"]) == pytest.approx((1.0, 0.75, 2))
    assert ("e2e part of the limit", STRICT, "ratio") not in rows
    assert rows["e2e overlap", "S = 1", "rollouts/s"]["notes"]["speedup"] == pytest.approx((2.0 + 1.0) / 2)
    assert rows["e2e overlap", "S = 1", "rollouts/s"]["notes"]["bottleneck_idle"] == pytest.approx(0.25)
    limit = rows["e2e overlap limit", STRICT, "ratio"]
    assert (limit["min"], limit["max"]) == pytest.approx((4 / 3, 2.0))
    assert rows["e2e accuracy", "S = 0", "s"]["median"] == 12.5
    assert ("e2e accuracy", "S = 1", "s") not in rows
    missing = rows["e2e missing", "rows", "count"]
    assert missing["median"] == 1
    assert missing["notes"]["missing"] == {"accuracy, S = 1": "not reached"}
    assert rows["e2e embedded", "S = 0, 1 generators", "tokens/s"]["median"] == pytest.approx((100 + 50) / 2)
