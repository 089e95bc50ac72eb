"""The scale suite: closed forms, labels that say simulated, predictions held against a run with known figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import readme_figures, run, scale, scale_figure, scale_sweeps
from benchmarks.compare import read
from benchmarks.scale_sweeps import Workload, orz_7b
from orz_async.sim.measured import measure
from orz_async.sim.models import EngineModel, LearnerModel, LengthModel
from orz_async.sim.rates import Rates
from tests.unit.test_plan import FakeRun, config


def workload(learner_s: float = 1.6) -> Workload:
    """A step of 128 rollouts of 50 tokens at 10 ms; the learner takes `learner_s` on one GPU, half of it on two."""
    engine = EngineModel(slots=32, queue=32, step_s=0.01)

    def rates(learner_gpus: int) -> Rates:
        return Rates(engine, LearnerModel(policy_s=learner_s / (128 * 50) / learner_gpus), ())

    return Workload("a test", config(prompts=32, samples=4), LengthModel(observed=(50,)), 0.0, rates)


def test_strong_scaling_is_that_of_the_closed_form() -> None:
    # On 4 GPUs, two of which generate: two rounds of 0.5 s, and 0.8 s of learning; on 8, one round and 0.4 s.
    rows = scale_sweeps.strong(workload(), sizes=(4, 8), lags=(0, 1))
    step_s = {r["variant"]: r["notes"]["step_s"] for r in rows}
    assert step_s["4 GPUs, S = 0"] == pytest.approx(1.8, rel=0.02)
    assert step_s["4 GPUs, S = 1"] == pytest.approx(1.0, rel=0.02)
    assert step_s["8 GPUs, S = 0"] == pytest.approx(0.9, rel=0.02)
    notes = rows[1]["notes"]
    assert (notes["generator_gpus"], notes["efficiency"]) == (2, 1.0)
    assert notes["over_least_lag"] == pytest.approx(1.8, rel=0.02)
    assert rows[2]["notes"]["efficiency"] == pytest.approx(1.0, rel=0.02)


def test_weak_scaling_keeps_the_time_of_a_step() -> None:
    rows = scale_sweeps.weak(workload(), 32, sizes=(4, 8, 16), lags=(1,))
    assert [r["notes"]["efficiency"] for r in rows] == pytest.approx([1.0] * 3, rel=0.03)
    assert rows[2]["median"] == pytest.approx(4 * rows[0]["median"], rel=0.03)


def test_rates_of_a_run_are_scaled_and_named(tmp_path: Path) -> None:
    fake = measure(FakeRun(tmp_path / "run").folder)
    work = scale_sweeps.measured_rates(fake)
    assert "measured" in work.label
    assert work.rates(4).learner.policy_s == pytest.approx(fake.rates.learner.policy_s / 4)
    assert work.rates(4).engine == fake.rates.engine


def test_a_prediction_is_held_against_the_run(tmp_path: Path) -> None:
    fake = measure(FakeRun(tmp_path / "run").folder)
    measured, simulated, error = scale.validated("a run", fake, (fake, fake))
    assert measured["median"] == pytest.approx(2.0)
    assert "simulated" not in measured["unit"] and "simulated" in simulated["unit"]
    assert error["median"] == pytest.approx(100 * abs(simulated["median"] / 2.0 - 1))
    assert error["notes"]["within"] is True
    slow = replace(fake.rates, learner=replace(fake.rates.learner, critic_s=2 * fake.rates.learner.critic_s))
    worse = scale.validated("a run", fake, (replace(fake, rates=slow),))[2]
    assert worse["notes"]["within"] is False and worse["median"] > 15


def test_every_simulated_row_says_so_and_whose_rates_it_has() -> None:
    rows = [
        *scale_sweeps.strong(orz_7b().with_rollouts(256), sizes=(8,), lags=(0, 1)),
        *scale_sweeps.weak(orz_7b(), 16, sizes=(8, 16), lags=(1,)),
    ]
    assert all(r["unit"].startswith("simulated") and "assumed H100" in r["name"] for r in rows)
    assert rows[0]["name"] == readme_figures.STRONG
    svg = scale_figure.figure(rows)
    assert svg.count("Simulated: ") == 2 and "assumed H100" in svg
    assert svg.count("<polyline") == 3  # two lags, and one
    with pytest.raises(LookupError, match="strong scaling"):
        scale_figure.figure(rows[2:])


def test_the_suite_draws_its_figure_beside_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [r for kind in (scale_sweeps.strong, scale_sweeps.weak) for r in kind(workload(), sizes=(4,), lags=(0,))]
    rows = [r | {"name": r["name"] + ", assumed"} for r in rows]
    monkeypatch.setattr(run, "measure", lambda *_, **__: rows)
    assert run.run_suite("scale", [], tmp_path / "scale.json", checked=False, settings={})
    assert len(read(tmp_path / "scale.json")["rows"]) == 2
    assert (tmp_path / "scale.svg").read_text() == scale_figure.figure(rows)


def test_failures_cost_what_they_undo() -> None:
    calm, generators, gpus = scale_sweeps.failures(
        orz_7b().with_rollouts(256),
        lags=(1,),
        kinds=("no failure", "10 generators an hour", "10 GPUs an hour"),
        seeds=(0,),
        steps=20,
    )
    assert calm["notes"]["failures"] == [0]
    assert generators["notes"]["failures"][0] > 0 and generators["notes"]["learner_restarts"] == [0]
    assert gpus["notes"]["learner_restarts"][0] > 0
    assert calm["name"] == readme_figures.FAILURES and gpus["notes"]["of_first"] == gpus["median"] / calm["median"]
    assert gpus["median"] < generators["median"] < calm["median"]
