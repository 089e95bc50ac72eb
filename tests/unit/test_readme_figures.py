"""README's figures: what commands print is read back, the newest result counts, and every line is made of rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import demo, peers, promises, readme_figures, readme_lines, storm
from benchmarks.e2e import STRICT
from benchmarks.newest import DEVICES, Absent, Results
from benchmarks.protocol import row
from benchmarks.told import Told
from orz_async.broker.verify import lines
from orz_async.cli import dispatch
from orz_async.cli_config import parse_config
from orz_async.recipes import tiny_cpu
from tests import fuzz_wire
from tests.chaos import run as chaos

Row = dict[str, Any]


def write(folder: Path, suite: str, rows: list[Row], *, date: str = "2026-01-01", device: str = DEVICES[0]) -> None:
    document = {"schema": 1, "suite": suite, "device": device, "date": date, "rows": rows}
    (folder / f"{suite}_{date}_{len(list(folder.iterdir()))}.json").write_text(json.dumps(document))


def medians(rows: list[Row]) -> dict[str, float]:
    return {r["variant"]: r["median"] for r in rows}


def test_the_newest_file_that_has_a_row_counts(tmp_path: Path) -> None:
    write(tmp_path, "cpu", [row("gae", "c++", "ms", [1.0]), row("pack", "c++", "ms", [5.0])])
    write(tmp_path, "cpu", [row("gae", "c++", "ms", [2.0])], date="2026-02-01")
    write(tmp_path, "cpu", [row("gae", "c++", "ms", [9.0])], date="2026-03-01", device="a laptop")
    write(tmp_path, "wire", [row("gae", "c++", "ms", [8.0])], date="2026-03-01")
    results = Results(tmp_path)
    assert results.rows("cpu", "gae").median("c++") == 2.0
    assert results.rows("cpu", "pack").median("c++") == 5.0
    with pytest.raises(LookupError, match=r"expected a row 'triton', found c\+\+"):
        results.rows("cpu", "gae").median("triton")
    with pytest.raises(Absent, match="no result of cpu with rows named 'delta'"):
        results.rows("cpu", "delta")


def test_a_line_from_another_machine_says_so(tmp_path: Path) -> None:
    idle = {"rollouts": 0.1}
    for n, suite in enumerate(("cpu", "wire")):
        write(tmp_path, suite, [row("x", "y", "ms", [1.0])], date=f"2026-01-0{n + 1}", device=DEVICES[1])
    write(tmp_path, "async", [row("async", "S = 0", "rollouts/s", [7.0], learner_idle=idle)], date="2026-02-01")
    table = readme_lines.measured(Results(tmp_path))
    assert f"two shared cores ({DEVICES[1]})" in table
    assert f"two turns ({DEVICES[0]}) |" in table


def test_variants_with_several_units_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "report", [row("report", "small", "s", [1.0]), row("report", "small", "MiB", [7.0])])
    rows = Results(tmp_path).rows("report", "report")
    assert (rows.median("small, s"), rows.median("small, MiB")) == (1.0, 7.0)


def test_what_simulations_print_is_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dispatch(["sim", "--seeds", "2"])
    found = promises.histories(Told("orz sim", capsys.readouterr().out))
    figures = medians(found)
    assert figures["histories"] == 2 and figures["violations"] == 0
    assert figures["faults"] > 2 and figures["rollouts trained"] > 50
    dispatch(["sim", "--scale", "--generators", "3", "--steps", "2", "--rollouts", "64"])
    large = promises.large(Told("orz sim", capsys.readouterr().out))
    assert [r["median"] for r in large[:3]] == [3, 2, 64]
    write(tmp_path, "promises", found + large)
    assert "2 histories, " in (said := readme_figures.histories(Results(tmp_path))) and "0 violations" in said
    assert readme_figures.large(Results(tmp_path)).endswith("s of one core")


def test_what_the_fuzzer_prints_is_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fuzz_wire.main(["1000"])
    write(tmp_path, "promises", promises.fuzz(Told("fuzz", capsys.readouterr().out)))
    assert readme_figures.fuzz(Results(tmp_path)).startswith("0 of 1,000 in ")


def storm_told(capsys: pytest.CaptureFixture[str], *others: str) -> Told:
    """What the chaos run prints, by its own functions, of a storm that was not."""
    kills = [("lean generator", ""), ("lean generator", ""), ("generator daemon", ""), ("launcher", "")]
    kills += [("learner", "before-publish"), ("learner", "after-take"), ("learner", "after-take")]
    folder = SimpleNamespace(
        kills=[SimpleNamespace(kind=kind, point=point or "at random") for kind, point in kills],
        detection=lambda: [1.0, 1.5],
        comebacks=lambda: [3.0],
    )
    weather = SimpleNamespace(
        plan=[],
        frozen=Counter({"one heartbeat": 3, "for ever": 4}),
        wire=SimpleNamespace(injected=Counter({"cut": 10, "delay": 20})),
        weights=SimpleNamespace(injected=Counter({"cut": 5})),
        shown_the_door=2,
    )
    chaos.report([folder], weather)  # type: ignore[list-item, arg-type]
    verified = SimpleNamespace(
        bounds=SimpleNamespace(max_lag=1, window=0, rollouts_per_step=2),
        records=9,
        segments=1,
        journal_bytes=5,
        steps=4,
        planned=4,
        finished=True,
        lives=2,
        granted=8,
        trained=8,
        expired={},
        quarantined=0,
        in_flight=0,
        lost=0,
        trained_twice=0,
        tokens_by_lag={0: 5},
        max_lag=1,
    )
    for name, value in lines(verified):  # type: ignore[arg-type]
        print(f"{name:16} {value}")
    chaos.say("storm: verified; losses equal those of the run, bit for bit, in all 108 steps")
    for line in (*others, "full_disk: verified"):
        chaos.say(line)
    print("chaos: nothing lost, nothing trained twice, every run finished; 469 s")
    return Told("chaos", capsys.readouterr().out)


def test_what_chaos_prints_is_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = storm.storm(storm_told(capsys))
    rows += storm.saves(Told("saves", "checkpoints: 99 of 100 loadable after kill -9 during save, 7 file operations"))
    write(tmp_path, "promises", rows)
    results = Results(tmp_path)
    assert readme_figures.chaos(results) == (
        "7 kill -9, 7 SIGSTOP, 35 wire faults: lost 0, trained twice 0, lag 1 of 1"
    )
    assert readme_figures.killed(results) == (
        "2 lean generators, 1 generator daemons, 3 learners (3 of them at 2 named points), 1 launchers, in 7:49"
    )
    assert "(n = 2)" in readme_figures.detection(results)
    assert readme_figures.replayed(results) == "108 steps"
    assert readme_figures.saves(results).startswith("99 of 100")
    assert readme_figures.full_disk(results).startswith("exit code 9")


def test_a_scene_that_was_left_out_is_not_claimed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = storm_told(capsys, "full disk: mounting a tmpfs is not permitted here; left out (...)")
    write(tmp_path, "promises", storm.storm(told))
    assert readme_figures.full_disk(Results(tmp_path)).startswith("not tried")


def test_output_of_another_form_is_an_error() -> None:
    with pytest.raises(LookupError, match="in what `orz sim` printed"):
        promises.histories(Told("orz sim", "nothing of the kind"))
    with pytest.raises(LookupError, match="expected 'SIGSTOP"):
        Told("chaos", "nothing").items("SIGSTOP")


def test_the_demo_is_recorded_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def command(name: str, *words: str) -> float:
        """`orz`, without the training: the words must be settings that it accepts."""
        if name == "make-base":
            return 30.0
        config = parse_config(list(words), prog=f"orz {name}")
        assert config.steps == tiny_cpu().steps and config.model.path != tiny_cpu().model.path
        seeds.append(config.seed)
        folder = Path(config.run_dir)
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"accuracy_after": 0.5 + config.seed / 10}))
        return 60.0 + config.seed

    monkeypatch.setattr(demo, "timed", command)
    figures = medians(demo.run())
    assert seeds == [0, 1, 2]
    assert figures == {"seed 0": 0.5, "seed 1": 0.6, "seed 2": 0.7, "from the command to the result": 91.0}


def test_figures_of_the_demo(tmp_path: Path) -> None:
    def summary(seed: int) -> dict[str, float]:
        return {
            "accuracy_before": 0.1 + seed / 10,
            "accuracy_after": 0.9,
            "train_wall_s": 50.0 + seed,
            "mismatch_max": 2e-6,
        }

    rows = [demo.of_summary(seed, summary(seed)) for seed in (0, 1, 2)]
    write(tmp_path, "demo", [*rows, row("demo", "from the command to the result", "s", [100.0, 112.0, 111.0])])
    results = Results(tmp_path)
    assert (
        readme_figures.demo(results, "accuracy", "{:.2f}") == "0.10 -> 0.90, 0.20 -> 0.90, 0.30 -> 0.90 (seed 0, 1, 2)"
    )
    assert readme_figures.demo_time(results) == "1:51, of it 0:51 training"


def test_figures_of_the_scale_suite(tmp_path: Path) -> None:
    title = "validation, tiny_cpu"
    rows = [row(title, "S = 0: measured", "s a step", [2.0]), row(title, "S = 0: simulated", "s", [2.2])]
    for gpus in ("8", "64", "1,024"):
        rows += [
            row(readme_figures.STRONG, f"{gpus} GPUs, S = {lag}", "simulated samples/s", [lag + 10.0])
            for lag in (0, 1, 4)
        ]
    for kind, kept in (("no failure", 1.0), ("1 GPU an hour", 0.75)):
        rows.append(row(readme_figures.FAILURES, f"64 GPUs, S = 1, {kind}", "simulated", [9.0], of_first=kept))
    write(tmp_path, "scale", rows)
    assert readme_figures.failures(Results(tmp_path)) == "75% with 1 GPU an hour"
    assert readme_figures.predicted(Results(tmp_path)) == "S = 0: 2.20 / 2.00 s"
    assert readme_figures.scaling(Results(tmp_path)).startswith("8 GPUs: 10 -> 11 -> 14; 64 GPUs: 10 -> ")


def test_figures_of_the_end_to_end_suite(tmp_path: Path) -> None:
    strict = row("e2e overlap", STRICT, "rollouts/s", [80.0], bottleneck="generator")
    idle = [row("e2e overlap", f"S = {lag}", "rollouts/s", [90.0], bottleneck_idle=0.01 * lag) for lag in (0, 1)]
    rates = [row("e2e vllm", "S = 0, 1 generator", unit, [7.0]) for unit in ("rollouts/s", "tokens/s")]
    rows = [
        row("e2e overlap limit", STRICT, "ratio", [1.6, 1.7]),
        *(row("e2e part of the limit", f"S = {lag}", "ratio", [0.7 + lag / 5]) for lag in (0, 1)),
        *[strict, *idle, row("e2e accuracy", "S = 4", "s", [12.4]), *rates],
    ]
    write(tmp_path, "e2e", rows)
    results = Results(tmp_path)
    assert readme_figures.overlap(results) == "limit 1.65; S = 0: 70%, S = 1: 90%"
    assert readme_figures.overlap_idle(results) == "S = 0: 0.0%, S = 1: 1.0% (generator)"
    assert readme_figures.time_to_accuracy(results) == "S = 4: 12 s"
    assert readme_figures.throughput(results) == "vllm, S = 0, 1 generator: 7"
    with pytest.raises(Absent):
        readme_figures.throughput(Results(tmp_path, devices=("a laptop",)))


def test_figures_of_the_peers(tmp_path: Path) -> None:
    rows = []
    for task in readme_figures.PEER_TASKS:
        for side, rate in ((peers.TRL, 100.0), (peers.GRPO, 250.0), (peers.PPO, 120.0)):
            rows.append(row(f"peers, {task}", side, "rollouts/s", [rate]) | {"ratio_to_first": rate / 100})
            rows.append(row(f"peers, {task}, to 90%", side, "s", [3000 / rate]))
    write(tmp_path, "peers", rows)
    results = Results(tmp_path)
    assert readme_figures.peers_rate(results).startswith("demo: TRL 100, ours 2.5 x, with critic 1.2 x; long tail: ")
    assert readme_figures.peers_time(results).endswith("long tail: TRL 30 s, ours 12 s, with critic 25 s")


def test_figures_of_learning(tmp_path: Path) -> None:
    def of(variant: str, *rewards: float) -> Row:
        curves = [{"reward": [0.0, value, value, value, value]} for value in rewards]
        return row("learning", variant, "reward", list(rewards), curves=curves)

    write(tmp_path, "learning", [of("S = 0, ppo", 0.5, 0.7), of("S = 0, decoupled", 0.4), of("S = 1, ppo", 0.1)])
    assert readme_figures.learning(Results(tmp_path)) == "S = 0: 0.600 / 0.400"


def test_figures_of_the_learner_step(tmp_path: Path) -> None:
    ratios = {"learner": 1.0, "bare arithmetic": 0.8, "padded": 2.0}
    rows = [row("learner_step 128 rollouts", v, "ms", [1.0]) | {"ratio_to_first": x} for v, x in ratios.items()]
    write(tmp_path, "cpu", rows)
    assert readme_figures.learner_step(Results(tmp_path)) == "1.25 x; padded batches would take 2.00 x"


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert readme_lines.measured(results).count("\n") == 4
    told = readme_lines.promises(results)
    assert told.count("no result committed") == len(readme_lines.PROMISES) and "Killed" not in told


def test_every_committed_suite_is_in_the_table() -> None:
    results = Results()
    missing = set()
    for line in readme_lines.MEASURED:
        try:
            assert line.figure(results)
        except Absent as absent:
            missing.add(str(absent).removeprefix("no result of ").split()[0])
    for suite in missing - {"e2e", "peers"}:  # which say themselves what there was no time for
        with pytest.raises(Absent):
            results.file(suite)  # a suite with a result has all its lines
