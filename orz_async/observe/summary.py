"""What a run came to, computed from its event logs alone: also of a run that was killed, resumed, or still goes on."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from orz_async.config import Config
from orz_async.observe.history import History
from orz_async.observe.tail import Event, Tail
from orz_async.observe.versions import versions

Z95 = 1.959964
"""Normal quantile of a two-sided 95 % interval."""


class Evaluation(msgspec.Struct, frozen=True):
    version: int
    """Policy version that was evaluated: the number of learner steps it has learned from."""
    wall_s: float
    """Training seconds until the result was in."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """95 % interval of the accuracy over problems; of one sample each, or of logs without it, Wilson's over samples."""
    length: float
    """Mean response length, tokens."""
    rollouts: int
    samples: int = 1
    """Of each problem: the k of avg@k, which the accuracy is."""
    passes: dict[str, float] = {}
    """pass@k, unbiased, by k: powers of two up to `samples`."""


class Rollouts(msgspec.Struct, frozen=True):
    """Every granted rollout ends exactly once: granted = trained + expired + quarantined + in_flight."""

    granted: int
    trained: int
    expired: int
    quarantined: int
    in_flight: int
    expired_by_cause: dict[str, int]

    @property
    def unaccounted(self) -> int:
        return self.granted - self.trained - self.expired - self.quarantined - self.in_flight


class Summary(msgspec.Struct, frozen=True):
    """summary.json. Before and after: held-out, the first and the last evaluation."""

    run_id: str
    finished: bool
    steps: int
    """Learner steps done; a step repeated after a resume counts once."""
    accuracy_before: float | None
    accuracy_after: float | None
    length_before: float | None
    length_after: float | None
    train_wall_s: float
    """From the learner being ready to the end of its last step; the time between a kill and the resume is left out."""
    max_lag: int
    """The bound."""
    max_lag_observed: int
    mismatch_max: float | None
    """Largest |learner - engine| log-probability under equal weights, over all steps."""
    generator_tokens_per_s: float
    """Sampled by all generators together, over train_wall_s."""
    learner_tokens_per_s: float
    """Trained response tokens, over train_wall_s."""
    learner_idle: dict[str, float]
    """Cause -> fraction of the training wall time; the mean over ranks."""
    generator_idle: dict[str, float]
    """The same, mean over daemons."""
    rollouts: Rollouts
    restarts: int
    """How often the learner was resumed."""
    config_hash: str
    versions: dict[str, str]
    evals: list[Evaluation]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (E. B. Wilson 1927); unlike the normal one it behaves at 0 and 1.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    if n <= 0:
        return 0.0, 1.0
    p, z2n = successes / n, Z95 * Z95 / n
    middle, half = p + z2n / 2, Z95 * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return max(0.0, (middle - half) / (1 + z2n)), min(1.0, (middle + half) / (1 + z2n))


def summarise(history: History, config: Config, config_hash: str) -> Summary:
    evals = [evaluation(event) for _, event in sorted(history.evals.items())]
    wall_s = history.train_wall_s
    steps = list(history.steps.values())
    mismatches = [float(e["mismatch_max"]) for e in steps if e.get("mismatch_max") is not None]
    trained_tokens = sum(int(e.get("tokens_trained") or 0) for e in steps)
    return Summary(
        run_id=history.run_id,
        finished=history.steps_done >= config.steps,
        steps=history.steps_done,
        accuracy_before=evals[0].accuracy if evals else None,
        accuracy_after=evals[-1].accuracy if evals else None,
        length_before=evals[0].length if evals else None,
        length_after=evals[-1].length if evals else None,
        train_wall_s=wall_s,
        max_lag=config.broker.max_lag,
        max_lag_observed=history.max_lag_observed,
        mismatch_max=max(mismatches, default=None),
        generator_tokens_per_s=history.generated_tokens() / wall_s if wall_s else 0.0,
        learner_tokens_per_s=trained_tokens / wall_s if wall_s else 0.0,
        learner_idle=history.idle("learner-"),
        generator_idle=history.idle("generator-"),
        rollouts=rollouts(history.funnel),
        restarts=max(0, len(history.lives) - 1),
        config_hash=config_hash,
        versions=history.versions or versions(),
        evals=evals,
    )


def evaluation(event: Event) -> Evaluation:
    accuracy, n = float(event.get("accuracy") or 0.0), int(event.get("rollouts") or 0)
    low, high = wilson(accuracy * n, n)
    if average := event.get("avg"):
        low, high = float(average["low"]), float(average["high"])
    return Evaluation(
        version=int(event["version"]),
        wall_s=float(event["wall_s"]),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        length=float(event.get("length_mean") or 0.0),
        rollouts=n,
        samples=int(event.get("samples") or 1),
        passes={k: float(estimate["value"]) for k, estimate in (event.get("pass") or {}).items()},
    )


def rollouts(funnel: Event) -> Rollouts:
    causes = {str(cause): int(n) for cause, n in (funnel.get("expired") or {}).items()}
    count = {name: int(funnel.get(name) or 0) for name in ("granted", "trained", "quarantined", "in_flight")}
    return Rollouts(expired=sum(causes.values()), expired_by_cause=causes, **count)


def read_history(run_dir: Path) -> History:
    history = History()
    history.feed_all(Tail(run_dir / "events").poll())
    return history


def write_summary(run_dir: Path, summary: Summary) -> None:
    path = run_dir / "summary.json"
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    fresh.replace(path)


def read_summary(run_dir: Path) -> Summary | None:
    """The summary written at the end of the last `orz run`, if there is one of this version."""
    try:
        return msgspec.json.decode((run_dir / "summary.json").read_bytes(), type=Summary)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
