"""Where the time of a run went, from its event log, and how much of it asynchrony can hide.

The learner's time for a step is what it does not wait, t_learn; where nothing overlaps, what it waits for rollouts is
the time of the other side: weights fetched, rollouts sampled, graded and sent, t_generate. Both are read off a strictly
synchronous run (S = 0, `learner.publish_early` off), where they add up to the step. With S >= 1 the slower side alone
can decide, so a step cannot become faster by more than

    limit = (t_generate + t_learn) / max(t_generate, t_learn)

provided that the sides share no core. It is a limit for a generator that starts and ends each step with empty slots, as
the synchronous one must; where slots go from one step to the next, generating costs less, and more can be reached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orz_async.observe.account import Account, Stretch, idle_fractions

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Of the steps after the first `skip` of a run. Seconds are means a step, idle is cause -> fraction of the time."""

    step_s: float
    wait_s: float
    """The learner waited for rollouts."""
    rollouts_s: float
    tokens_s: float
    """Response tokens trained."""
    length: float
    """Tokens of a response, mean."""
    max_lag: int
    learner_s: dict[str, float]
    """By state."""
    generator_s: dict[str, float]
    """By state, mean over the daemons."""
    learner_idle: dict[str, float]
    generator_idle: dict[str, float]
    """Mean over the daemons."""

    @property
    def learn_s(self) -> float:
        return self.step_s - self.wait_s

    @property
    def limit(self) -> float:
        """Largest speed-up that overlap can bring; only where this run is strictly synchronous."""
        return overlap_limit(self.wait_s, self.learn_s)

    @property
    def bottleneck(self) -> str:
        """The slower side; only where this run is strictly synchronous."""
        return "generator" if self.wait_s > self.learn_s else "learner"

    def idle_of(self, side: str) -> float:
        return sum((self.generator_idle if side == "generator" else self.learner_idle).values())


def overlap_limit(generate_s: float, learn_s: float) -> float:
    """(t_generate + t_learn) / max(t_generate, t_learn): 1 where one side has nothing to do, 2 where both are equal."""
    if not generate_s >= 0 <= learn_s or not generate_s + learn_s > 0:
        raise ValueError(f"expected two times of which one is positive, found {generate_s} s and {learn_s} s")
    return (generate_s + learn_s) / max(generate_s, learn_s)


def of_limit(synchronous: Times, overlapped: Times) -> float:
    """Which part of the limit a run reached: its speed-up over the strictly synchronous run, divided by the limit."""
    return overlapped.rollouts_s / synchronous.rollouts_s / synchronous.limit


def read_events(run_dir: Path) -> dict[str, list[Event]]:
    """Process -> its events. A torn last line is left out."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for path in sorted((run_dir / "events").glob("*.jsonl"))
    }


def times(events: Mapping[str, Sequence[Event]], skip: int) -> Times:
    """ValueError unless there are steps left after the first `skip`, of which there is at least one."""
    reported = [event for event in events.get("learner-0", ()) if event["kind"] == "step"]
    steps = reported[skip:]
    if skip < 1 or not steps:
        raise ValueError(f"expected steps after the first {skip} (at least 1), found {len(reported)} steps in all")
    window = (reported[skip - 1]["t"], steps[-1]["t"])
    wall_s = window[1] - window[0]
    learner_s: dict[str, float] = {}
    for step in steps:
        for state, seconds in step["seconds"].items():
            learner_s[state] = learner_s.get(state, 0.0) + seconds / len(steps)
    rollouts, tokens = (sum(step[name] for step in steps) for name in ("rollouts", "tokens_trained"))
    readings = [_account(told).read(window) for name, told in events.items() if name.startswith("generator-")]
    return Times(
        step_s=wall_s / len(steps),
        wait_s=learner_s.get("wait_rollouts", 0.0),
        rollouts_s=rollouts / wall_s,
        tokens_s=tokens / wall_s,
        length=tokens / rollouts,
        max_lag=max(step["lag_max"] for step in steps),
        learner_s=learner_s,
        generator_s=_mean_by_state([seconds for _, seconds in readings], len(steps)),
        learner_idle=idle_fractions([(wall_s / len(steps), learner_s)]),
        generator_idle=idle_fractions(readings),
    )


def _mean_by_state(daemons: Sequence[Mapping[str, float]], num_steps: int) -> dict[str, float]:
    states = sorted({state for seconds in daemons for state in seconds})
    return {state: sum(seconds.get(state, 0.0) for seconds in daemons) / len(daemons) / num_steps for state in states}


def _account(told: Sequence[Event]) -> Account:
    account = Account()
    for event in told:
        if event["kind"] == "timeline":
            account.add(Stretch(event["t"] - sum(event["seconds"].values()), event["t"], event["seconds"]))
    return account


def time_to(accuracy: float, evaluations: Sequence[Mapping[str, Any]]) -> float | None:
    """Training seconds until the first evaluation with at least this accuracy was in; None where there was none."""
    return next((float(e["wall_s"]) for e in evaluations if e["accuracy"] >= accuracy), None)
