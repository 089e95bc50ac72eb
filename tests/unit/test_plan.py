"""The planner: predictions against closed forms and against event logs with known figures; memory; errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from orz_async.broker.segments import encode_header, encode_record, name_of
from orz_async.cli import dispatch
from orz_async.config import BrokerConfig, Config, EvalConfig, GeneratorConfig, LearnerConfig
from orz_async.config_toml import to_toml
from orz_async.errors import ConfigError, ModelError
from orz_async.records import Span, Trajectory, float32_bytes, int32_bytes
from orz_async.sim import planner
from orz_async.sim.measured import _decode, measure
from orz_async.sim.memory import generator_memory, learner_memory
from orz_async.sim.models import EngineModel, LearnerModel, LengthModel
from orz_async.sim.planner import Candidate, Forecast, Pools, coarse_forecast, forecast, recommend, splits
from orz_async.sim.shape import KNOWN, find_shape
from orz_async.sim.tasks import Lengths


def config(*, prompts: int = 32, samples: int = 4, max_lag: int = 1) -> Config:
    return Config(
        steps=8,
        broker=BrokerConfig(prompts_per_step=prompts, samples_per_prompt=samples, max_lag=max_lag),
        generator=GeneratorConfig(count=2, slots=64, queue=64),
        eval=EvalConfig(every=0),
    )


ENGINE = EngineModel(slots=64, queue=64, step_s=0.02)
FIXED = Lengths(0, LengthModel(observed=(50,)))


def test_a_slow_learner_sets_the_pace() -> None:
    pools = Pools(2, ENGINE, LearnerModel(fixed_s=3.0, publish_s=1.0, critic_s=1e-3))
    found = forecast(config(), pools, FIXED, prompt_tokens=0.0, max_lag=1)
    assert found.step_s == pytest.approx(4.0 + 1e-3 * 128 * 50)
    assert found.samples_s == pytest.approx(128 / found.step_s)
    assert found.learner_idle == 0.0
    # 64 rollouts of 50 tokens at 20 ms take an engine 1 s of each step.
    assert sum(found.generator_idle.values()) == pytest.approx(1 - 1.0 / found.step_s, abs=0.01)
    assert found.tokens_s == pytest.approx(128 * 50 / found.step_s, rel=0.01)


def test_slow_generators_set_the_pace() -> None:
    pools = Pools(1, ENGINE, LearnerModel(fixed_s=0.1))
    found = forecast(config(), pools, FIXED, prompt_tokens=0.0, max_lag=2)
    assert found.step_s == pytest.approx(2.0, rel=0.05)  # two rounds of 64 rollouts, a second each
    assert found.learner_idle == pytest.approx(0.95, abs=0.02)
    assert sum(found.generator_idle.values()) < 0.02


def test_lag_hides_the_shorter_side() -> None:
    pools = Pools(2, ENGINE, LearnerModel(fixed_s=1.0))
    steps = [forecast(config(), pools, FIXED, prompt_tokens=0.0, max_lag=lag).step_s for lag in (0, 1)]
    assert steps == [pytest.approx(2.0, rel=0.02), pytest.approx(1.0, rel=0.05)]


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_steps_that_come_in_bursts_are_counted_whole(lag: int) -> None:
    """Generators to spare and hardly anything to learn: lag + 1 steps start together, and end a second later."""
    pools = Pools(12, ENGINE, LearnerModel(fixed_s=1e-3))
    found = forecast(config(), pools, FIXED, prompt_tokens=0.0, max_lag=lag)
    assert found.step_s == pytest.approx(1.0 / (lag + 1), rel=0.02)


def test_a_coarse_simulation_agrees_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MOST_ROLLOUTS", 256)
    whole = config(prompts=128, samples=8)
    pools = Pools(2, EngineModel(slots=64, queue=64, step_s=0.01, row_s=1e-4), LearnerModel(policy_s=4e-6))
    law = Lengths(3, LengthModel(mean=50, spread=0.7, longest=150))
    fine = forecast(whole, pools, law, prompt_tokens=10.0, max_lag=1)
    coarse = coarse_forecast(whole, pools, law, prompt_tokens=10.0, max_lag=1)
    assert planner.coarsened(whole, pools)[2] == 4
    assert coarse.step_s == pytest.approx(fine.step_s, rel=0.1)
    assert coarse.samples_s == pytest.approx(fine.samples_s, rel=0.1)
    assert coarse.tokens_s == pytest.approx(fine.tokens_s, rel=0.1)


def test_splits_surround_the_balance() -> None:
    assert splits(8, 1, generator_s=6.0, learner_s=2.0, most=3) == [4, 5, 6]
    assert splits(8, 2, generator_s=1.0, learner_s=1.0, most=1) == [4]
    with pytest.raises(ConfigError, match="at least 5 GPUs, 4 for an engine and one to learn, found 4"):
        splits(4, 4, 1.0, 1.0)


def test_the_least_lag_that_is_nearly_as_fast_is_recommended() -> None:
    def candidate(max_lag: int, samples_s: float) -> Candidate:
        return Candidate(1, 1, Forecast(max_lag, 1.0, samples_s, 0.0, 0.0, {}, {}))

    assert recommend([candidate(0, 60), candidate(1, 98), candidate(4, 100)]).forecast.max_lag == 1


def test_sizes_of_known_models() -> None:
    """Against the parameter counts on Qwen's model cards: 0.49 B, 1.54 B, 7.61 B, 32.5 B."""
    counts = {"0.5b": 0.49e9, "1.5b": 1.54e9, "7b": 7.61e9, "32b": 32.5e9}
    for name, count in counts.items():
        assert KNOWN[name].params == pytest.approx(count, rel=0.02), name
    seven = KNOWN["7b"]
    assert seven.kv_bytes(2) == 2 * 28 * 4 * 128 * 2
    assert learner_memory(seven, Config(), 8).parts["optimizer"] == pytest.approx(2 * 8 * 7.3e9 / 8 / 2**30, rel=0.05)
    away = Config(learner=LearnerConfig(offload_optimizer=True, activation_checkpointing=True, max_tokens=16384))
    step = learner_memory(seven, away, 1).parts
    assert (step["optimizer"], step["activations"]) == (pytest.approx(8 * seven.params / 2**30), 0.0)
    assert learner_memory(seven, away, 64).parts["optimizer"] == 0.0, "there the backward pass needs more"
    spread = generator_memory(seven, Config(), 4, context=1000.0)
    assert spread.total == pytest.approx(generator_memory(seven, Config(), 1, context=1000.0).total / 4)


def test_shape_of_a_directory(tmp_path: Path) -> None:
    described = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(described | {"vocab_size": 10, "tie_word_embeddings": True}))
    shape = find_shape(None, str(tmp_path))
    assert (shape.kv_heads, shape.head_dim) == (2, 4)
    assert shape.params == 10 * 8 + 8 + 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8)
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="vocab_size"):
        find_shape(None, str(tmp_path))
    with pytest.raises(ConfigError, match=r"found: No such file.*--shape"):
        find_shape(None, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="expected --shape to be one of"):
        find_shape("70b", "")


class FakeRun:
    """Event logs and a journal of a run that took 2 s a step, as two generators and a learner would write them."""

    STEPS = 8
    T0 = 1000.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "events").mkdir(parents=True)
        (folder / "journal").mkdir()
        (folder / "config.toml").write_text(to_toml(config(prompts=4, samples=4)))
        self.write("learner-0", self.learner())
        for name in ("generator-g0", "generator-g1"):
            self.write(name, self.generator())
        body = b"".join(part for n in range(self.STEPS * 16) for part in encode_record(self.trajectory(n)))
        (folder / "journal" / name_of(0)).write_bytes(encode_header(b"r" * 16, 0) + body)

    def write(self, name: str, events: list[dict[str, object]]) -> None:
        lines = [json.dumps({"v": 1, "process": name, "m": 0.0} | event) for event in events]
        (self.folder / "events" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def learner(self) -> list[dict[str, object]]:
        events: list[dict[str, object]] = [{"t": self.T0, "kind": "run", "run_id": "r", "resumed_step": None}]
        spent = {"wait_rollouts": 0.2, "values": 0.3, "policy": 0.7, "publish": 0.1, "critic": 0.6, "audit": 0.1}
        for step in range(self.STEPS):
            events.append(
                {
                    "t": self.T0 + 2.0 * (step + 1),
                    "kind": "step",
                    "step": step,
                    "seconds": spent,
                    "rollouts": 16,
                    "tokens_trained": 16 * 20,
                    "lag_histogram": {"0": 80, "1": 240},
                    "lag_max": 1,
                }
            )
        return events

    def generator(self) -> list[dict[str, object]]:
        """Busy for 0.8 s of each second, 8 rows, 100 decode steps in that time."""
        events: list[dict[str, object]] = []
        for second in range(1, 2 * self.STEPS + 1):
            t = self.T0 + second
            seconds = {"generate": 0.7, "grade": 0.1, "wait_leases": 0.15, "wait_weights": 0.05}
            events.append({"t": t, "kind": "timeline", "name": "generator", "seconds": seconds})
            events.append({"t": t, "kind": "throughput", "tokens": 800 * second, "running": 8, "queued": 0})
            events.append({"t": t, "kind": "weights", "fetch_s": 0.04, "swap_s": 0.01})
        return events

    @staticmethod
    def trajectory(number: int) -> Trajectory:
        return Trajectory(
            kind="train",
            rollout=number,
            attempt=0,
            prompt_id="p",
            sample=0,
            prompt=int32_bytes([1] * 5),
            response=int32_bytes([2] * 20),
            logprobs=float32_bytes([-1.0] * 20),
            spans=(Span(0, 0),),
            reward=1.0,
            finish="stop",
            verdict="correct",
            generator="g0",
            generate_s=0.1,
        )


def test_rates_and_figures_of_a_run(tmp_path: Path) -> None:
    found = measure(FakeRun(tmp_path / "run").folder)
    engine, learner = found.rates.engine, found.rates.learner
    assert engine.seconds_per_token(8) == pytest.approx(0.8 / 100)
    assert (engine.fetch_s, engine.swap_s) == (pytest.approx(0.04), pytest.approx(0.01))
    assert learner.policy_s == pytest.approx(1.0 / (16 * 25))
    assert learner.critic_s == pytest.approx(0.7 / (16 * 25))
    assert learner.publish_s == pytest.approx(0.1)
    assert (found.num_generators, found.prompt_tokens, len(found.lengths)) == (2, 5.0, 128)
    assert found.found.step_s == pytest.approx(2.0)
    assert found.found.samples_s == pytest.approx(8.0)
    assert found.found.tokens_s == pytest.approx(1600.0)
    assert found.found.learner_idle == pytest.approx(0.1)
    assert found.found.generator_idle == {"leases": pytest.approx(0.15), "weights": pytest.approx(0.05)}
    assert found.found.lag == {0: 0.25, 1: 0.75}


def test_who_publishes_late_does_everything_before(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run").folder
    whole = config(prompts=4, samples=4)
    late = dataclasses.replace(whole, learner=dataclasses.replace(whole.learner, publish_early=False))
    (run / "config.toml").write_text(to_toml(late))
    learner = measure(run).rates.learner
    assert (learner.policy_s, learner.critic_s) == (pytest.approx(1.7 / (16 * 25)), 0.0)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(FakeRun(tmp_path / "run").folder)
    assert dispatch(["plan", "--run", run]) == 0
    printed = capsys.readouterr().out
    assert "simulated    measured" in printed
    assert "step, s" in printed
    small = ["--broker.prompts-per-step", "4", "--broker.samples-per-prompt", "4", "--sampling.max-new-tokens", "64"]
    assert dispatch(["plan", "tiny_cpu", "--gpus", "3", "--shape", "0.5b", "--lags", "0,1", *small]) == 0
    printed = capsys.readouterr().out
    assert "assumed: H100 SXM" in printed
    assert "recommended (simulated)" in printed
    assert "memory a GPU" in printed
    assert dispatch(["plan", "tiny_cpu", "--gpus", "3", "--shape", "0.5b", "--rates-from", run, *small]) == 0
    assert f"measured in {run}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tiny_cpu"], "expected --gpus N of at least 2"),
        (["tiny_cpu", "--gpus", "2", "--shape", "7b", "--gpu", "tpu"], "expected --gpu to be one of a100, h100, h200"),
        (["tiny_cpu", "--gpus", "2", "--shape", "7b", "--lags", "x"], "expected --lags such as 0,1,2"),
        (["tiny_cpu", "--gpus", "2", "--model.path", "/nowhere"], "expected the model's config.json"),
        (["--run", "/nowhere"], "expected the folder of a run"),
        (["tiny_cpu", "--run", "/nowhere"], "expected `orz plan --run RUN` alone"),
        (["tiny_cpu", "--gpus", "2", "--generator.slotz", "3"], "expected a known setting"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch(["plan", *argv])


def test_an_engine_that_counts_its_steps_is_measured_though_it_is_mostly_idle() -> None:
    """In turn 10 steps of 8 rows and 20 of 2, 1 ms each and 0.5 ms a row; when it reports, nothing runs."""
    events: list[dict[str, Any]] = []
    tokens = steps = 0
    for second in range(6):
        count, rows = ((20, 2), (10, 8))[second % 2]
        tokens, steps = tokens + count * rows, steps + count
        seconds = {"generate": count * (0.001 + 0.0005 * rows), "wait_leases": 0.9}
        own = {"t": 100.0 + second, "process": "generator-g0"}
        events.append(own | {"kind": "timeline", "seconds": seconds})
        events.append(own | {"kind": "throughput", "tokens": tokens, "steps": steps, "running": 0, "queued": 0})
    step_s, row_s = _decode(events)
    assert (step_s, row_s) == (pytest.approx(0.001, rel=0.05), pytest.approx(0.0005, rel=0.05))
    with pytest.raises(ConfigError, match="expected seconds in which a generator was busy"):
        _decode([{**event, "steps": None} for event in events])
