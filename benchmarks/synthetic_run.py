"""A run folder of any size without training: events, journal and token sample as a run of that size leaves them.

For the tests and the benchmark of the report; the numbers are consistent with each other and mean nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from orz_async.broker.segments import encode_header, encode_record, name_of
from orz_async.broker.transitions import Taken
from orz_async.config import BrokerConfig, Config, ModelConfig
from orz_async.config_toml import to_toml
from orz_async.observe.tokens import StepTokens, TokenLog
from orz_async.records import Span, Trajectory, float32_bytes, int32_bytes

WORDS = (
    "so",
    " the",
    " sum",
    " is",
    " 4",
    " 7",
    " wait",
    ",",
    ".",
    "\n",
    " therefore",
    " x",
    " =",
    " check",
    " again",
    "!",
)
STEP_S = 10.0
_POOL = 512
_EDGES = 12
"""Bins of the critic's calibration."""


@dataclass(frozen=True)
class Made:
    """What was written, for comparison with what is read."""

    rewards: list[float]
    """Mean by step."""
    lengths: list[float]
    rollouts: int
    tokens: int


def write_run(
    folder: Path,
    *,
    steps: int,
    prompts: int,
    samples: int,
    generators: int = 2,
    response: tuple[int, int] = (4, 20),
    words: Sequence[str] = WORDS,
    sample_rollouts: int = 16,
    segment_bytes: int = 64 << 20,
    seed: int = 0,
) -> Made:
    """Lengths of the responses are uniform in `response`; `words` is what the tokenizer's numbers stand for."""
    batch = prompts * samples
    model = folder / "model"
    model.mkdir(parents=True)
    _tokenizer(model, words)
    config = Config(
        run_dir=str(folder),
        steps=steps,
        model=ModelConfig(path=str(model)),
        broker=BrokerConfig(prompts_per_step=prompts, samples_per_prompt=samples, max_lag=1),
    )
    (folder / "config.toml").write_text(to_toml(config))
    rng = np.random.default_rng(seed)
    pool = [_draft(rng, response, len(words)) for _ in range(_POOL)]
    journal = _Journal(folder / "journal", segment_bytes)
    log, token_log = _Events(folder / "events", generators), TokenLog(folder / "tokens", 1)
    rewards, lengths, total = [], [], 0
    for step in range(steps):
        picks = rng.integers(_POOL, size=batch)
        # Later steps have more right answers.
        right = rng.random(batch) < 0.2 + 0.7 * step / steps
        journal.step(step, batch, samples, [pool[p] for p in picks], right, generators)
        sizes = [pool[p].num_response_tokens for p in picks]
        log.step(step, right, sizes, batch)
        token_log.append(_tokens(step, batch, sizes, rng, sample_rollouts))
        rewards.append(float(right.mean()))
        lengths.append(float(np.mean(sizes)))
        total += sum(sizes)
    journal.close()
    token_log.close()
    log.close(steps * batch)
    return Made(rewards, lengths, steps * batch, total)


def _tokenizer(model: Path, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel

    vocabulary = {word: number for number, word in enumerate(words)} | {"a": len(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(model / "tokenizer.json"))


def _draft(rng: np.random.Generator, response: tuple[int, int], vocabulary: int) -> Trajectory:
    count = int(rng.integers(*response, endpoint=True))
    return Trajectory(
        kind="train",
        rollout=0,
        attempt=0,
        prompt_id=f"p{rng.integers(10_000)}",
        sample=0,
        prompt=int32_bytes(rng.integers(vocabulary, size=8)),
        response=int32_bytes(rng.integers(vocabulary, size=count)),
        logprobs=float32_bytes(-rng.exponential(0.3, count)),
        spans=(Span(0, 0),),
        reward=0.0,
        finish="length" if count == response[1] else "stop",
        verdict="",
        generator="",
        generate_s=0.5,
    )


class _Journal:
    def __init__(self, folder: Path, segment_bytes: int) -> None:
        folder.mkdir()
        self._folder, self._segment_bytes = folder, segment_bytes
        self._index = self._written = 0
        self._file = (folder / name_of(0)).open("wb")
        self._file.write(encode_header(b"r" * 16, 0))

    def step(self, step: int, batch: int, samples: int, drafts: list[Trajectory], right: Any, generators: int) -> None:
        """Rollouts of step n are sampled by version n - 1, so that their lag is 1; those of step 0 by version 0."""
        spans = (Span(max(0, step - 1), 0),)
        for n, draft in enumerate(drafts):
            good = bool(right[n])
            self._add(
                Trajectory(
                    draft.kind,
                    step * batch + n,
                    0,
                    draft.prompt_id,
                    n % samples,
                    draft.prompt,
                    draft.response,
                    draft.logprobs,
                    spans,
                    float(good),
                    draft.finish,
                    "correct" if good else "wrong",
                    f"g{n % generators}",
                    draft.generate_s,
                )
            )
        self._add(Taken(step, tuple(range(step * batch, (step + 1) * batch))))

    def _add(self, record: Trajectory | Taken) -> None:
        if self._written > self._segment_bytes:
            self._file.close()
            self._file = (self._folder / name_of(self._index)).open("wb")
            self._written = self._file.write(encode_header(b"r" * 16, self._index))
        for part in encode_record(record):
            self._written += self._file.write(part)
        self._index += 1

    def close(self) -> None:
        self._file.close()


class _Events:
    """One event a second and process, as real processes write them."""

    def __init__(self, folder: Path, generators: int) -> None:
        folder.mkdir()
        names = ["broker", "learner-0", *(f"generator-g{n}" for n in range(generators))]
        self._files = {name: (folder / f"{name}.jsonl").open("wb") for name in names}
        self._tokens = 0
        for name in names:
            self._emit(name, 1e9, "process", pid=1, versions={"orz_async": "synthetic"})
        self._emit("learner-0", 1e9 + 1, "run", run_id="synthetic", resumed_step=None, epoch=1)

    def _emit(self, process: str, t: float, kind: str, **fields: Any) -> None:
        head = {"v": 1, "t": float(t), "m": float(t), "process": process, "kind": kind}
        self._files[process].write(msgspec.json.encode(head | fields) + b"\n")

    def step(self, step: int, right: Any, sizes: list[int], batch: int) -> None:
        began, end = 1e9 + 1 + STEP_S * step, 1e9 + 1 + STEP_S * (step + 1)
        self._tokens += sum(sizes)
        for second in range(1, int(STEP_S) + 1):
            for name in self._files:
                wait = "wait_rollouts" if name == "learner-0" else "wait_leases"
                seconds = {wait: 0.1, "work": 0.9}
                if name != "broker":
                    self._emit(name, began + second, "timeline", name=name, seconds=seconds, state="work", state_s=0.9)
                if name.startswith("generator"):
                    share = self._tokens // (len(self._files) - 2)
                    fields = {"tokens": share, "tokens_s": 1.0, "running": 64, "queued": 8, "rollouts": batch * step}
                    self._emit(name, began + second, "throughput", version=step, **fields)
        self._emit("learner-0", end, "step", **_step_fields(step, right, sizes, batch))
        self._emit("learner-0", end - 2, "published", version=step + 1, bytes=1 << 30, seconds=0.25)
        for name in self._files:
            if name.startswith("generator"):
                travelled = {"bytes": 1 << 25, "fetch_s": 0.3, "swap_s": 0.05, "base_version": step}
                self._emit(name, end - 1, "weights", version=step + 1, **travelled)
        if step % 10 == 0:
            accuracy = {"accuracy": float(right.mean()), "rollouts": 200, "length_mean": float(np.mean(sizes))}
            self._emit("learner-0", end, "eval", version=step, **accuracy)

    def close(self, rollouts: int) -> None:
        funnel = {"granted": rollouts + 7, "trained": rollouts, "quarantined": 1, "in_flight": 0}
        for tokens in (7, 30):
            lost = {"lease": ["train", 0, 0], "tokens": tokens, "versions": [[0, 0]], "reason": "another did it"}
            self._emit("generator-g0", 2e9 - 1, "abandoned", **lost)
        self._emit("broker", 2e9, "funnel", expired={"deadline": 4, "lost": 2}, **funnel)
        for file in self._files.values():
            file.close()


def _step_fields(step: int, right: Any, sizes: list[int], batch: int) -> dict[str, Any]:
    tokens, lag = sum(sizes), min(step, 1)
    by_lag = {str(lag): {"tokens": tokens, "ratio": 1.001, "abs_delta": 0.01, "outside_clip": 0.002}}
    bins = Counter({min(_EDGES - 2, 1 + step * 9 // 1000): tokens})
    return {
        "step": step,
        "version": step + 1,
        "rollouts": batch,
        "reward_mean": float(right.mean()),
        "length_mean": float(np.mean(sizes)),
        "length_max": max(sizes),
        "truncated_fraction": float((np.array(sizes) == max(sizes)).mean()),
        "verdicts": {"correct": int(right.sum()), "wrong": int(batch - right.sum())},
        "tokens_trained": tokens,
        "lag_max": lag,
        "lag_mean": float(lag),
        "lag_histogram": {str(lag): tokens},
        "by_lag": by_lag,
        "mismatch_max": 1e-6,
        "mismatch_mean": 1e-7,
        "mismatch_by_lag": {str(lag): {"tokens": 64, "max": 1e-6, "mean": 1e-7}},
        "policy": {
            "loss": 0.01,
            "ratio_mean": 1.0,
            "ratio_min": 0.8,
            "ratio_max": 1.3,
            "kl_k3": 1e-4,
            "ess": 0.99,
            "clip_low": 0.001,
            "clip_high": 0.002,
            "entropy": 0.5,
        },
        "value": {"loss": 0.02, "value_mean": 0.5, "return_mean": float(right.mean())},
        "explained_variance": 0.4,
        "calibration": {
            "tokens": [bins[n] for n in range(_EDGES)],
            "values": [bins[n] * (n - 0.5) / 10 for n in range(_EDGES)],
            "returns": [bins[n] * float(right.mean()) for n in range(_EDGES)],
        },
        "grad_norm": 0.5,
        "critic_grad_norm": 0.7,
        "lr": 1e-6,
        "seconds": {"policy": 4.0, "critic": 5.0, "wait_rollouts": 1.0},
        "step_s": STEP_S,
    }


def _tokens(step: int, batch: int, sizes: list[int], rng: np.random.Generator, count: int) -> StepTokens:
    chosen = np.sort(rng.choice(batch, min(count, batch), replace=False))
    lengths = [sizes[n] for n in chosen]
    total = sum(lengths)
    gaps = np.full(total, np.nan)
    gaps[: lengths[0]] = 1e-7
    return StepTokens(
        step,
        int32_bytes(step * batch + chosen),
        int32_bytes(lengths),
        float32_bytes(rng.random(total)),
        float32_bytes(rng.normal(size=total)),
        float32_bytes(rng.normal(0, 0.05, size=total)),
        float32_bytes(gaps),
    )


if __name__ == "__main__":
    import sys

    folder, steps, prompts, samples = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    print(
        json.dumps(
            {"rollouts": write_run(folder, steps=steps, prompts=prompts, samples=samples, generators=8).rollouts}
        )
    )
