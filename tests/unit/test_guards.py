"""What is not finite is left out or ends the run, rollouts are kept, alarms have names and tighten S; memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import learner_kit as kit
import msgspec
import pytest
import test_learner_loop as loop
import torch

from orz_async.broker.book import Book
from orz_async.broker.transitions import LedgerConfig
from orz_async.config import Config, GuardConfig
from orz_async.errors import DataError, NumericError, OutOfMemoryError
from orz_async.learner import kept
from orz_async.learner import trainer as trainer_module
from orz_async.learner.alarms import Alarms
from orz_async.learner.trainer import Trainer
from orz_async.records import Trajectory, float32_bytes


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.save_model(tmp_path_factory.mktemp("model"))


def state(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for m in (trainer.policy, trainer.critic) if m is not None for p in m.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def guarded(model: Path | str, **changes: Any) -> Config:
    guard = changes.pop("guard", {})
    return dataclasses.replace(kit.config(model, **changes), guard=GuardConfig(**guard))


def poisoned(batch: list[Trajectory], what: str) -> list[Trajectory]:
    if what == "reward":
        return [msgspec.structs.replace(batch[0], reward=float("nan")), *batch[1:]]
    wrong = float32_bytes([float("inf")] * batch[0].num_response_tokens)
    return [msgspec.structs.replace(batch[0], logprobs=wrong), *batch[1:]]


@pytest.mark.parametrize("what", ["reward", "logprob", "value", "policy gradient", "critic gradient"])
def test_nothing_moves_in_a_step_that_is_left_out(model_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    trainer = kit.trainer(guarded(model_path, guard={"nonfinite": "skip", "max_skips": 1}))
    critic = trainer.critic
    assert critic is not None
    for version in range(3):
        before = state(trainer)
        batch = kit.rollouts(6, seed=version, version=version)
        broken = version == 1
        if broken and what in ("reward", "logprob"):
            batch = poisoned(batch, what)
        elif broken and what == "value":
            critic.score.bias.data.fill_(float("nan"))
        elif broken:
            module: Any = trainer.policy if what == "policy gradient" else critic
            hook = next(module.parameters()).register_hook(lambda grad: grad * float("nan"))
        step = trainer.begin(batch)
        policy, _ = trainer.update_policy(step)
        value = trainer.update_critic(step)
        trainer.conclude(policy, value)
        if broken and what == "value":
            critic.score.bias.data.fill_(0.0)
        elif broken and "gradient" in what:
            hook.remove()
        after = state(trainer)
        count = len(list(trainer.policy.parameters()))
        if not broken:
            assert not same(before[:count], after[:count])
            assert not policy.skipped
            continue
        reasons = [*policy.skipped, *value.skipped]
        assert all("learner step 1" in reason for reason in reasons)
        assert bool(policy.skipped) == (what != "critic gradient")
        assert bool(value.skipped) == (what != "policy gradient")
        assert same(before[:count], after[:count]) == (what != "critic gradient")
        if what != "value":
            assert same(before[count:], after[count:]) == (what != "policy gradient")
    assert trainer.num_steps == 3


def test_stop_is_the_default_and_too_many_skips_stop(model_path: Path) -> None:
    batch = poisoned(kit.rollouts(6), "reward")
    with pytest.raises(NumericError, match="rewards in learner step 0"):
        kit.trainer(guarded(model_path)).begin(batch)
    trainer = kit.trainer(guarded(model_path, guard={"nonfinite": "skip", "max_skips": 2}))
    for version in range(3):
        step = trainer.begin(poisoned(kit.rollouts(6, version=version), "reward"))
        reports = (trainer.update_policy(step)[0], trainer.update_critic(step))
        if version < 2:
            trainer.conclude(*reports)
    with pytest.raises(NumericError, match="max_skips = 2"):
        trainer.conclude(*reports)


class Poisoned(loop.Sampler):
    def take(self, step: int) -> list[Trajectory]:
        batch = super().take(step)
        return poisoned(batch, "reward") if step == 1 else batch


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_rollouts_of_a_broken_step_are_kept(model_path: Path, tmp_path: Path, policy: str) -> None:
    config = dataclasses.replace(loop.make_config(model_path), guard=GuardConfig(nonfinite=policy))  # type: ignore[arg-type]
    if policy == "stop":
        with pytest.raises(NumericError):
            loop.run(config, tmp_path, Poisoned(config))
    else:
        assert loop.run(config, tmp_path, Poisoned(config)).num_steps == 4
        assert [bool(e["skipped"]) for e in loop.events(tmp_path, "step")] == [False, True, False, False]
    [told] = loop.events(tmp_path, "kept")
    assert told["step"] == 1
    batch = kept.load(tmp_path / told["path"])
    assert [t.rollout for t in batch] == list(range(6, 12))
    assert batch[0].reward != batch[0].reward
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(DataError, match="learner kept"):
        kept.load(tmp_path / "other")


def out_of_memory(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Backward fails for microbatches of more tokens, after it has left gradients behind."""
    sizes: list[int] = []
    make = trainer_module.make_microbatch

    def made(*args: Any) -> Any:
        micro = make(*args)
        sizes.append(len(micro.tokens_N))
        return micro

    backward = torch.autograd.backward

    def failing(loss: torch.Tensor) -> None:
        backward(loss)
        if max(sizes) > limit:
            sizes.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(trainer_module, "make_microbatch", made)
    monkeypatch.setattr(torch.autograd, "backward", failing)
    return sizes


def test_out_of_memory_is_halved_and_retried_once(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is the one that smaller microbatches make; what the failed attempt left behind does not count."""
    config = guarded(model_path, learner={"max_tokens": 128})
    found = []
    for limit in (None, 64):
        trainer = kit.trainer(config, dtype=torch.float64, exact=True)
        with monkeypatch.context() as patch:
            if limit:
                out_of_memory(patch, limit)
            step = trainer.begin(kit.rollouts(9))
            report, table = trainer.update_policy(step)
            trainer.update_critic(step)
        found.append((state(trainer), report.losses, table.histogram))
    assert trainer._max_tokens == 64
    assert found[0][2] == found[1][2]
    for got, want in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_out_of_memory_twice_ends_with_advice(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = kit.trainer(guarded(model_path, learner={"max_tokens": 128}))
    step = trainer.begin(kit.rollouts(9))
    before = state(trainer)
    out_of_memory(monkeypatch, 0).append(1)
    with pytest.raises(OutOfMemoryError, match=r"64 tokens to fit.*Tried to allocate.*max_tokens") as caught:
        trainer.update_policy(step)
    assert caught.value.exit_code == 13
    assert same(before, state(trainer))


def fields(version: int, **changes: Any) -> dict[str, Any]:
    return {
        "version": version,
        "length_mean": 100.0,
        "truncated_fraction": 0.1,
        "policy": {"tokens": 1000.0, "entropy": 1.0},
        "mismatch_k3": 1e-6,
        "by_lag": {"0": {"outside_clip": 0.0}, "1": {"outside_clip": 0.02}},
    } | changes


ALARMING: dict[str, dict[str, Any]] = {
    "truncation_rate": {"truncated_fraction": 0.6},
    "length_drift": {"length_mean": 40.0},
    "entropy_collapse": {"policy": {"tokens": 1000.0, "entropy": 0.1}},
    "mismatch_kl": {"mismatch_k3": 0.05},
    "clip_mass": {"by_lag": {"0": {"outside_clip": 0.0}, "3": {"outside_clip": 0.4}}},
}


@pytest.mark.parametrize("name", ALARMING)
def test_each_alarm_has_its_name_and_can_tighten(name: Any) -> None:
    alarms = Alarms(GuardConfig(tighten=(name,), tighten_steps=3), max_lag=2)
    for version in range(6):
        assert alarms.look(fields(version)) == []
    assert alarms.tightening(6) == 0
    [alarm] = alarms.look(fields(6, **ALARMING[name]))
    assert alarm.name == name
    assert [alarms.tightening(version) for version in (6, 8, 9)] == [1, 1, 0]
    quiet = Alarms(GuardConfig(), max_lag=2)
    for version in range(6):
        quiet.look(fields(version, **ALARMING[name]))
    assert quiet.tightening(6) == 0, "no alarm tightens unless it is told to"


def test_alarms_lower_s_no_further_than_0_and_can_be_off() -> None:
    off = GuardConfig(
        truncated_above=None,
        length_drift_above=None,
        entropy_below=None,
        mismatch_kl_above=None,
        clip_mass_above=None,
    )
    everything = {key: value for change in ALARMING.values() for key, value in change.items()}
    silent, loud = Alarms(off, 1), Alarms(GuardConfig(tighten=tuple(ALARMING)), 1)  # type: ignore[arg-type]
    for version in range(6):
        silent.look(fields(version))
        loud.look(fields(version))
    assert silent.look(fields(6, **everything)) == []
    assert len(loud.look(fields(6, **everything))) == 5
    assert loud.tightening(6) == 1


class Long(loop.Sampler):
    """Every rollout of step 1 is truncated; keeps what it is told."""

    def take(self, step: int) -> list[Trajectory]:
        batch = super().take(step)
        return [msgspec.structs.replace(t, finish="length" if step == 1 else "stop") for t in batch]

    def tighten(self, by: int) -> None:
        self.told.append(("tighten", by))


def test_an_alarm_of_a_run_is_in_its_log_and_tightens(model_path: Path, tmp_path: Path) -> None:
    guard = GuardConfig(truncated_above=0.99, tighten=("truncation_rate",), tighten_steps=2, clip_mass_above=None)
    config = dataclasses.replace(
        loop.make_config(model_path, steps=6, broker={"max_lag": 1}, eval={"every": 0}), guard=guard
    )
    sampler = Long(config)
    loop.run(config, tmp_path, sampler)
    assert [e["name"] for e in loop.events(tmp_path, "alarm")] == ["truncation_rate"]
    assert [(e["step"], e["by"], e["max_lag"]) for e in loop.events(tmp_path, "tighten")] == [(1, 1, 0), (3, 0, 1)]
    assert [by for what, by in sampler.told if what == "tighten"] == [1, 0]


def test_a_tightened_ledger_admits_later_and_never_more_than_its_bound() -> None:
    config = LedgerConfig(rollouts_per_step=4, samples_per_prompt=2, max_lag=2, total_steps=10)
    book = Book(config, str)
    assert (book.limit, book.floor(11)) == (12, 0)
    book.tighten(1)
    assert (book.limit, book.floor(11)) == (8, 1)
    book.tighten(5)
    assert (book.limit, book.floor(11)) == (4, 2)
    book.tighten(0)
    assert book.limit == 12
