"""What a report says of a run is what its journal and its token sample hold."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.synthetic_run import Made, write_run
from orz_async.broker.segments import read
from orz_async.cli import dispatch
from orz_async.errors import ConfigError
from orz_async.observe.tokens import read_tokens
from orz_async.records import Trajectory
from orz_async.report import rollouts
from orz_async.report.page import read_run, report
from orz_async.report.pieces import Pieces
from orz_async.report.timeline import MOST_BINS, Timelines

STEPS, PROMPTS, SAMPLES = 12, 8, 4
BATCH = PROMPTS * SAMPLES


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, write_run(run, steps=STEPS, prompts=PROMPTS, samples=SAMPLES, segment_bytes=20_000)


def by_step(run: Path) -> dict[int, list[Trajectory]]:
    steps = defaultdict(list)
    for trajectory in read(run / "journal"):
        steps[trajectory.rollout // BATCH].append(trajectory)
    return steps


def test_curves_equal_what_the_journal_holds(made: tuple[Path, Made]) -> None:
    run, _ = made
    numbers, _ = read_run(run)
    series = numbers["series"]
    assert series["step"] == list(range(1, STEPS + 1))
    lags: Counter[str] = Counter()
    for step, trajectories in by_step(run).items():
        assert len(trajectories) == BATCH
        lengths = [t.num_response_tokens for t in trajectories]
        assert series["reward"][step] == pytest.approx(np.mean([t.reward for t in trajectories]), rel=1e-6)
        assert series["length"][step] == pytest.approx(np.mean(lengths), rel=1e-6)
        assert series["truncated"][step] == pytest.approx(np.mean([t.finish == "length" for t in trajectories]))
        verdicts = Counter(t.verdict for t in trajectories)
        assert {name: counts[step] for name, counts in numbers["verdicts"].items()} == dict(verdicts)
        lags.update(str(step - int(v)) for t in trajectories for v in t.versions())
    assert numbers["lag_histogram"] == dict(lags)
    assert series["tokens"][-1] == sum(lags.values())


def test_funnel_and_calibration_add_up(made: tuple[Path, Made]) -> None:
    run, facts = made
    numbers, _ = read_run(run)
    funnel = numbers["funnel"]
    assert funnel["trained"] == facts.rollouts and funnel["expired_by_cause"] == {"deadline": 4, "lost": 2}
    assert funnel["granted"] == funnel["trained"] + funnel["expired"] + funnel["quarantined"] + funnel["in_flight"]
    assert funnel["unaccounted"] == 0
    assert funnel["abandoned_tokens"] == 37
    assert sum(b["tokens"] for part in numbers["calibration"] for b in part["bins"]) == facts.tokens
    assert [w["version"] for w in numbers["weights"]] == list(range(1, STEPS + 1))
    assert numbers["weights"][0]["bytes_mean"] == 1 << 25 and numbers["weights"][0]["generators"] == 2


def test_every_rollout_is_shown_with_its_text_and_values(made: tuple[Path, Made]) -> None:
    run, facts = made
    found = rollouts.choose(run, facts.rollouts, run / "model")
    rows, bodies = found["rows"], [json.loads(body) for body in found["bodies"]]
    assert sorted(rows["rollout"]) == list(range(facts.rollouts))
    trajectories = {t.rollout: t for t in read(run / "journal")}
    sampled = {n: columns for tokens in read_tokens(run / "tokens") for n, columns in tokens.columns()}
    assert sum(rows["values"]) == len(sampled)
    pieces = Pieces(run / "model")
    for number, step, lag, body in zip(rows["rollout"], rows["step"], rows["lag"], bodies, strict=True):
        trajectory = trajectories[number]
        assert step == number // BATCH + 1 and lag == step - 1 - trajectory.version_first
        assert body["pieces"] == pieces(np.frombuffer(trajectory.response, "<i4").tolist())
        if number in sampled:
            assert unpack(body["channels"]["value"]) == pytest.approx(sampled[number]["values"], abs=1e-4)
            assert unpack(body["channels"]["advantage"]) == pytest.approx(sampled[number]["advantages"], abs=1e-3)


def unpack(packed: list[Any]) -> list[float]:
    import base64

    scale, text = packed
    raw = np.frombuffer(base64.b64decode(text), "<i2")
    return [float("nan") if n == -32768 else n * scale for n in raw.tolist()]


@given(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), min_size=1, max_size=50))
def test_sixteen_bits_are_enough(values: list[float]) -> None:
    array = np.array(values, np.float32)
    largest = np.nanmax(np.abs(array), initial=0.0)
    np.testing.assert_allclose(unpack(rollouts.half(array)), array, atol=float(largest) * 2e-5 + 1e-30)


def test_a_small_budget_keeps_a_fair_part_and_says_so(made: tuple[Path, Made]) -> None:
    run, facts = made
    found = rollouts.choose(run, facts.rollouts, run / "model", most_bytes=30_000)
    shown = len(found["bodies"])
    assert 20 < shown < facts.rollouts and sum(map(len, found["bodies"])) <= 30_000
    assert found["notes"][0].startswith(f"{shown} of {facts.rollouts} rollouts")
    assert len(set(found["rows"]["step"])) > STEPS / 2, "the sample is spread over the run"


def test_torn_and_missing_files_are_told_not_fatal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, steps=3, prompts=4, samples=2)
    segment = next((run / "journal").iterdir())
    segment.write_bytes(segment.read_bytes()[:-100])
    with (run / "events" / "learner-0.jsonl").open("a") as file:
        file.write('{"v":1,"t":1.0,"kind":"st')
    (run / "model" / "tokenizer.json").write_text("{")
    numbers, told = report([run], run / "report.html")
    assert "1 lines of the event logs could not be read" in numbers[0]["notes"]
    assert any("could not be read to the end: journal-" in line for line in told)
    assert any("unreadable tokenizer.json" in line for line in told)
    for name in ("journal", "tokens"):
        (run / name).rename(tmp_path / name)
    _, told = report([run], run / "report.html")
    assert any("no rollout can be shown" in line for line in told)


def test_the_command_prints_the_numbers_of_the_page(
    made: tuple[Path, Made], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = made
    assert dispatch(["report", str(run), "--json"]) == 0
    assert not (run / "report.html").exists()
    [numbers] = json.loads(capsys.readouterr().out)
    assert numbers == json.loads(json.dumps(read_run(run)[0]))
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        dispatch(["report", str(run / "journal")])


def test_time_is_neither_lost_nor_made_when_bins_grow() -> None:
    lines = Timelines()
    for second in range(1, 3000):
        event = {"process": "p", "kind": "timeline", "t": 100.0 + second, "seconds": {"a": 0.75, "wait_b": 0.25}}
        lines.feed(event if second % 2 else event | {"spans": [["a", 0.5], ["wait_b", 0.25], ["a", 0.25]]})
    result = lines.result()
    assert result["bins"] <= MOST_BINS
    totals = {state: sum(values) / 1e3 for state, values in result["processes"]["p"].items()}
    assert totals == pytest.approx({"a": 0.75 * 2999, "wait_b": 0.25 * 2999}, rel=1e-3)
    full = [sum(values[n] for values in result["processes"]["p"].values()) for n in range(result["bins"] - 1)]
    assert max(full) <= result["width_s"] * 1e3 + 2
