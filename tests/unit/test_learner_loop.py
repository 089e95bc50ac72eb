"""The loop of rank 0 with a synchronous sampler in the place of broker and generators: same code, no sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learner_kit as kit
import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from orz_async.config import Config, DataConfig, SamplingConfig
from orz_async.errors import Interrupted, NumericError
from orz_async.learner import checkpoint
from orz_async.learner.attention import PackedLayout
from orz_async.learner.audit import Auditor
from orz_async.learner.batch import make_step_batch
from orz_async.learner.durable import begin_epoch
from orz_async.learner.lag_table import LagTable
from orz_async.learner.loop import Learner
from orz_async.learner.model import build_critic, load_policy
from orz_async.learner.parallel import World
from orz_async.learner.services import Services
from orz_async.learner.signals import Stop
from orz_async.learner.trainer import Trainer
from orz_async.observe.events import EventLog, Timeline
from orz_async.records import Span, Trajectory, float32_bytes, int32_bytes
from orz_async.weights.protocol import PublishReport
from orz_async.weights.snapshot import state_digest

END = 0


class Sampler:
    """Rollouts and weights of a synchronous loop: samples each step from the newest version, or from one `lag` older.

    A batch is a function of weights and rollout numbers alone, as with the real engine.
    """

    def __init__(self, config: Config, *, lag: int = 0, error: float = 0.0) -> None:
        self.config, self.lag, self.error = config, lag, error
        self.policy = load_policy(config.model.path)
        self.versions: dict[int, dict[str, Tensor]] = {}
        self.told: list[tuple[str, int]] = []
        self.taken = 0
        self.on_take: Callable[[int], None] = lambda step: None
        self.on_published: Callable[[int], None] = lambda version: None

    def publish(self, version: int, named: Iterable[tuple[str, Tensor]]) -> PublishReport:
        self.told.append(("publish", version))
        self.versions[version] = {name: t.clone() for name, t in named}
        return PublishReport(version=version, bytes=0, seconds=0.0, digest=state_digest(self.versions[version]))

    def published(self, version: int, digest: str) -> None:
        assert digest == state_digest(self.versions[version])
        self.told.append(("published", version))
        self.on_published(version)

    def evaluate(self, version: int) -> None:
        self.told.append(("evaluate", version))

    def evaluation_ready(self, version: int) -> bool:
        return version < max(self.versions)

    def evaluation(self, version: int, timeout_s: float) -> list[Trajectory]:
        return self.sample(range(10_000, 10_004), version)

    def snapshot(self) -> bytes:
        return msgspec.json.encode(self.taken)

    def checkpointed(self, oldest_version: int) -> None:
        self.told.append(("checkpointed", oldest_version))

    def take(self, step: int) -> list[Trajectory]:
        self.on_take(step)
        count = self.config.broker.rollouts_per_step
        version = max(0, step - self.lag)
        self.taken += count
        return self.sample(range(step * count, (step + 1) * count), version)

    def sample(self, numbers: Sequence[int], version: int) -> list[Trajectory]:
        """All at once, packed: one forward pass a token."""
        self.policy.load_state_dict(self.versions[version], strict=False)
        rngs = [np.random.default_rng([7, number]) for number in numbers]
        prompts = [rng.integers(1, kit.VOCAB, int(rng.integers(2, 6))).tolist() for rng in rngs]
        responses: list[list[int]] = [[] for _ in numbers]
        logprobs: list[list[float]] = [[] for _ in numbers]
        for _ in range(self.config.sampling.max_new_tokens):
            running = [n for n, response in enumerate(responses) if END not in response]
            logprobs_BV = self.next_logprobs([prompts[n] + responses[n] for n in running]) if running else []
            for n, logprob_V in zip(running, logprobs_BV, strict=True):
                token = int(torch.searchsorted(logprob_V.exp().cumsum(0), rngs[n].random()).clamp(max=kit.VOCAB - 1))
                responses[n].append(token)
                logprobs[n].append(float(logprob_V[token]) + self.error)
        return [
            trajectory(number, version, *made)
            for number, *made in zip(numbers, prompts, responses, logprobs, strict=True)
        ]

    def next_logprobs(self, rows: list[list[int]]) -> Tensor:
        lengths = [len(row) for row in rows]
        with torch.no_grad():
            hidden_ND = self.policy.model(
                torch.tensor([list(chain.from_iterable(rows))]),
                position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
                use_cache=False,
                layout=PackedLayout.from_lengths(lengths),
            ).last_hidden_state[0]
            last_BD = hidden_ND[torch.tensor(lengths).cumsum(0) - 1]
            return torch.log_softmax(self.policy.lm_head(last_BD) / self.config.sampling.temperature, -1)


def trajectory(number: int, version: int, prompt: list[int], response: list[int], logprobs: list[float]) -> Trajectory:
    done = response[-1] == END
    right = done and sum(response) % 2 == 0
    return Trajectory(
        kind="train",
        rollout=number,
        attempt=0,
        prompt_id=str(number // 2),
        sample=number % 2,
        prompt=int32_bytes(prompt),
        response=int32_bytes(response),
        logprobs=float32_bytes(logprobs),
        spans=(Span(version, 0),),
        reward=float(right),
        finish="stop" if done else "length",
        verdict="correct" if right else "wrong" if done else "truncated",
        generator="sync",
        generate_s=0.0,
    )


def run(config: Config, run_dir: Path, sampler: Sampler, stop: Stop | None = None) -> Trainer:
    """What start.py does, with the sampler outside."""
    found = checkpoint.find(run_dir)
    policy = load_policy(config.model.path)
    critic = build_critic(policy, seed=config.seed)
    auditor = Auditor(config, policy, torch.device("cpu"))
    trainer = Trainer(config, policy, critic, World.single())
    if found is not None:
        checkpoint.restore(trainer, found.path)
        sampler.taken = msgspec.json.decode(found.ledger())
    events = EventLog(run_dir / "events" / "learner-0.jsonl", "learner-0")
    timeline = Timeline(events, "learner-0")
    identity = begin_epoch(checkpoint.folder(run_dir))
    try:
        Learner(
            config, trainer, auditor, Services(run_dir, identity, sampler, sampler, events, timeline, stop or Stop())
        ).run()
    finally:
        events.close()
    return trainer


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events" / "learner-0.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def make_config(model: Path, **changes: Any) -> Config:
    given: dict[str, Any] = {
        "steps": 4,
        "sampling": SamplingConfig(max_new_tokens=9, temperature=0.8),
        "eval": {"every": 2},
        "checkpoint": {"every": 3},
        "broker": {"max_lag": 0},
        "learner": {"audit_rollouts": 3},
        "data": DataConfig(heldout="some"),
    }
    return kit.config(model, **(given | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.save_model(tmp_path_factory.mktemp("model"))


def state(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for m in (trainer.policy, trainer.critic) for p in m.parameters()]


def test_the_order_of_things(model: Path, tmp_path: Path) -> None:
    sampler = Sampler(make_config(model))
    trainer = run(make_config(model), tmp_path, sampler)
    assert trainer.num_steps == 4
    # Version 0 before step 0; an evaluation is asked for before the publication that would admit training rollouts.
    assert sampler.told == [
        *[("publish", 0), ("evaluate", 0), ("published", 0), ("publish", 1), ("published", 1)],
        *[("publish", 2), ("evaluate", 2), ("published", 2), ("publish", 3), ("published", 3), ("checkpointed", 3)],
        *[("publish", 4), ("evaluate", 4), ("published", 4), ("checkpointed", 3)],
    ]
    assert [e["version"] for e in events(tmp_path, "eval")] == [0, 2, 4]
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [3, 4]
    steps = events(tmp_path, "step")
    assert [(e["step"], e["version"]) for e in steps] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    first = steps[0]
    assert first["rollouts"] == 6 == sum(first["verdicts"].values())
    assert (first["lag_max"], first["lag_mean"], list(first["lag_histogram"])) == (0, 0.0, ["0"])
    assert first["lag_histogram"]["0"] == first["tokens_trained"] == first["mismatch_tokens"]
    assert first["mismatch_max"] < 1e-5
    assert abs(first["policy"]["ratio_max"] - 1) < 1e-5
    assert {"wait_rollouts", "values", "policy", "publish", "critic"} <= first["seconds"].keys()
    assert abs(sum(first["seconds"].values()) - first["step_s"]) < 1e-9
    assert len(first["losses"]["policy"]) == 1
    assert len(first["losses"]["value"]) == 2
    assert first["grad_norm"] > 0 < first["critic_grad_norm"]
    assert first["truncated_fraction"] == first["verdicts"].get("truncated", 0) / 6


def test_publishing_late_changes_when_and_nothing_else(model: Path, tmp_path: Path) -> None:
    trainers, order = {}, {}
    for early in (True, False):
        config, folder = make_config(model, learner={"publish_early": early}), tmp_path / str(early)
        trainers[early] = run(config, folder, Sampler(config))
        lines = (folder / "events" / "learner-0.jsonl").read_text().splitlines()
        told = [e for e in map(json.loads, lines) if e["kind"] in ("step", "published")]
        order[early] = [(e["kind"], e["version"]) for e in told]
    assert all(torch.equal(a, b) for a, b in zip(state(trainers[True]), state(trainers[False]), strict=True))
    steps = range(1, 5)
    assert order[True] == [("published", 0), *((kind, v) for v in steps for kind in ("published", "step"))]
    assert order[False] == [("published", 0), *((kind, v) for v in steps for kind in ("step", "published"))]


def test_exports_load_in_transformers(model: Path, tmp_path: Path) -> None:
    trainer = run(make_config(model, steps=1), tmp_path, Sampler(make_config(model)))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokens = torch.arange(1, 8)[None]
    for (name, got), (_, want) in zip(policy.named_parameters(), trainer.policy.named_parameters(), strict=True):
        assert torch.equal(got, want), name
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "export" / "critic").eval()
    batch = kit.rollouts(1)
    want_R = trainer._everywhere(trainer._round(make_step_batch(batch, version=0, max_lag=0), [0]), trainer.critic)
    both = np.frombuffer(batch[0].prompt + batch[0].response, "<i4")
    values_T = critic(torch.from_numpy(both[:-1].astype(np.int64))[None]).logits[0, :, 0]
    torch.testing.assert_close(values_T[-len(want_R) :], want_R, atol=1e-5, rtol=1e-5)
    assert policy(tokens).logits.shape == (1, 7, kit.VOCAB)


def test_two_runs_are_equal_bit_for_bit(model: Path, tmp_path: Path) -> None:
    one, two = (run(make_config(model), tmp_path / name, Sampler(make_config(model))) for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(two), strict=True))
    keep = ("losses", "policy", "value", "reward_mean", "grad_norm")
    assert [[e[k] for k in keep] for e in events(tmp_path / "one", "step")] == [
        [e[k] for k in keep] for e in events(tmp_path / "two", "step")
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_a_wait_saves_and_resumes_bit_exactly(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    config = make_config(model)
    straight = run(config, tmp_path / "straight", Sampler(config))
    interrupted = Sampler(config)
    interrupted.on_take = lambda step: os.kill(os.getpid(), number) if step == 2 else None
    with Stop().installed() as stop, pytest.raises(Interrupted, match=number.name):
        run(config, tmp_path / "cut", interrupted, stop)
    found = checkpoint.find(tmp_path / "cut")
    assert found is not None
    assert (found.manifest.step, found.ledger()) == (2, b"12")
    resumed = run(config, tmp_path / "cut", Sampler(config))
    assert [e["step"] for e in events(tmp_path / "cut", "step")] == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(state(straight), state(resumed), strict=True))
    found = checkpoint.find(tmp_path / "cut")
    assert found is not None
    assert found.manifest.epoch == 2


def test_signal_in_computation_waits_for_the_step_boundary(model: Path, tmp_path: Path) -> None:
    config = make_config(model)
    sampler = Sampler(config)
    sampler.on_published = lambda version: os.kill(os.getpid(), signal.SIGTERM) if version == 2 else None
    with Stop().installed() as stop, pytest.raises(Interrupted):
        run(config, tmp_path, sampler, stop)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.manifest.step == 2, "the critic of step 1 was trained before the learner left"


def test_the_same_signal_again_leaves_at_once() -> None:
    """Ctrl-C arrives as SIGINT and, by way of torchrun, as SIGTERM: that pair is one request."""
    code = (
        "import os, signal, sys\n"
        "from orz_async.learner.signals import Stop\n"
        "with Stop().installed() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('too late', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "still here True\n")


def test_audit_compares_under_the_versions_that_sampled(model: Path, tmp_path: Path) -> None:
    config = make_config(model, broker={"max_lag": 1})
    run(config, tmp_path, Sampler(config, lag=1))
    later = [e for e in events(tmp_path, "step") if e["step"] >= 1]
    assert all(list(e["lag_histogram"]) == ["1"] for e in later)
    assert all(e["mismatch_tokens"] > 0 for e in later), "only the audited rollouts can be compared"
    assert all(e["mismatch_max"] < 1e-5 for e in later)
    for event in later:
        assert event["mismatch_by_lag"].keys() == {"1"}
        one = event["mismatch_by_lag"]["1"]
        assert {f"mismatch_{name}": value for name, value in one.items()}.items() <= event.items()
        assert 0 <= one["k3"] <= one["max"] ** 2
    assert any(abs(e["policy"]["ratio_max"] - 1) > 1e-4 for e in later), "the policy has moved since"


def test_an_engine_that_computes_something_else_is_noticed(model: Path, tmp_path: Path) -> None:
    config = make_config(model, learner={"mismatch_warn": 1e-3, "mismatch_stop": 0.01})
    run(config, tmp_path / "warned", Sampler(config, error=-0.005))
    assert [round(e["max"], 4) for e in events(tmp_path / "warned", "mismatch")] == [0.005] * 4
    for event in events(tmp_path / "warned", "mismatch"):
        assert event["k3"] == pytest.approx(np.expm1(0.005) - 0.005, rel=1e-2)
        assert event["by_lag"]["0"]["mean"] == pytest.approx(0.005, rel=1e-2)
    with pytest.raises(NumericError, match=r"mismatch_stop = 0\.01"):
        run(config, tmp_path / "stopped", Sampler(config, error=-0.05))


@pytest.mark.parametrize("error", [-0.05, float("nan")])
def test_stopping_does_not_depend_on_warning(model: Path, error: float) -> None:
    table = LagTable(1)
    table.add_mismatch(1, torch.tensor([0.0, error]))
    config = make_config(model, learner={"mismatch_warn": 1.0, "mismatch_stop": 0.01})
    learner = Learner(config, SimpleNamespace(num_steps=0), None, SimpleNamespace(events=EventLog.disabled()))  # type: ignore[arg-type]
    with pytest.raises(NumericError, match=r"mismatch_stop = 0\.01"):
        learner.check_mismatch(table)


def test_mismatch_by_lag_is_summed_over_ranks() -> None:
    """k3 of the differences d is the mean of exp(d) - 1 - d, for each lag by itself."""
    deltas = {0: torch.tensor([0.1, -0.2]), 2: torch.tensor([0.3])}
    table, other = LagTable(2), LagTable(2)
    for lag, delta in deltas.items():
        table.add_mismatch(lag, delta)
    other.add_mismatch(2, torch.tensor([-0.4]))
    theirs = torch.cat([other._sums.flatten(), other._mismatch.flatten(), other._mismatch_max])
    table.sum_over(SimpleNamespace(gather=lambda mine: [mine, theirs]))  # type: ignore[arg-type]
    found = table.mismatch_by_lag()
    assert found.keys() == {"0", "2"}
    assert found["2"] == pytest.approx(
        {"max": 0.4, "mean": 0.35, "k3": (np.exp(0.3) - 1.3 + np.exp(-0.4) - 0.6) / 2, "tokens": 2}, rel=1e-6
    )
    assert table.mismatch() == pytest.approx(
        (0.4, 0.25, float(np.mean([np.exp(d) - 1 - d for d in (0.1, -0.2, 0.3, -0.4)])), 4), rel=1e-6
    )


def test_a_complete_run_has_nothing_left_to_do(model: Path, tmp_path: Path) -> None:
    config = make_config(model)
    first = run(config, tmp_path, Sampler(config))
    sampler = Sampler(config)
    again = run(config, tmp_path, sampler)
    assert [what for what, _ in sampler.told] == ["publish", "evaluate", "published"]
    assert all(torch.equal(a, b) for a, b in zip(state(first), state(again), strict=True))
