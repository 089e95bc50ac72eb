"""What the history of a run says at this moment, in words: shared by live view, plain log and summary."""

from __future__ import annotations

from orz_async.config import Config
from orz_async.observe.events import IDLE_PREFIX
from orz_async.observe.history import LEARNER, History, Process
from orz_async.observe.summary import evaluation

SILENT_S = 15.0
"""A process that has written no event for this long is called silent: it is busy, frozen or gone."""


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def rate(tokens_s: float) -> str:
    return f"{tokens_s:,.0f} tokens/s"


def idle(fractions: dict[str, float]) -> str:
    """idle 12 % (rollouts 10, publish 2)"""
    total = sum(fractions.values())
    causes = [
        f"{cause} {share:.0%}" for cause, share in sorted(fractions.items(), key=lambda c: -c[1]) if share >= 0.005
    ]
    return f"idle {total:.0%}" + (f" ({', '.join(causes)})" if causes else "")


def left(history: History, config: Config) -> str:
    step_s = history.step_s()
    if step_s is None:
        return ""
    return f"{duration(max(0, config.steps - history.steps_done) * step_s)} left"


def headline(history: History, config: Config, now: float) -> str:
    learner = history.processes.get(LEARNER)
    # A learner that is away does not train: its clock stands still.
    until = min(now, learner.seen) if learner else now
    trained = f", {duration(history.trained_s(until))} trained" if history.lives else ", starting"
    remaining = left(history, config)
    return f"step {history.steps_done}/{config.steps}{trained}{', ' + remaining if remaining else ''}"


def learning(history: History, config: Config) -> str:
    """reward 0.62   held-out 0.71 (0.64 to 0.77) at step 40   length 24.3   lag 1 of 1"""
    parts = []
    if history.steps:
        step = history.steps[max(history.steps)]
        parts.append(f"reward {step.get('reward_mean') or 0.0:.3f}")
    if history.evals:
        last = evaluation(history.evals[max(history.evals)])
        interval = f"({last.accuracy_low:.2f} to {last.accuracy_high:.2f})"
        parts.append(f"held-out {last.accuracy:.3f} {interval} at step {last.version}")
    if history.steps:
        parts.append(f"length {step.get('length_mean') or 0.0:.1f}")
        parts.append(f"truncated {step.get('truncated_fraction') or 0.0:.1%}")
        parts.append(f"lag {step.get('lag_max') or 0} of {config.broker.max_lag}")
    return "   ".join(parts)


def learner_rate(history: History, last: int = 10) -> float:
    """Trained tokens a second over the last steps of the present life."""
    start = history.lives[-1].start if history.lives else 0.0
    steps = [e for e in list(history.steps.values())[-last - 1 :] if e["t"] >= start]
    if len(steps) < 2:
        return 0.0
    tokens = sum(float(e.get("tokens_trained") or 0) for e in steps[1:])
    return tokens / max(1e-9, float(steps[-1]["t"] - steps[0]["t"]))


def doing(process: Process, now: float) -> str:
    """What a process works on, or what it waits for and since when."""
    quiet = now - process.seen
    if quiet > SILENT_S:
        return f"silent for {duration(quiet)}"
    if process.state.startswith(IDLE_PREFIX):
        return f"waits for {process.state.removeprefix(IDLE_PREFIX)}, {process.state_s + quiet:.1f} s"
    return process.state


def process_rows(history: History, now: float) -> list[tuple[str, str, str, str]]:
    """(name, speed, what it does, idle) of the learner and of each generator heard of in the last minute."""
    rows = []
    if learner := history.processes.get(LEARNER):
        rows.append(("learner", rate(learner_rate(history)), doing(learner, now), idle(learner.idle_now())))
    for process in history.those("generator-"):
        if now - process.seen > 60.0:
            continue
        status = process.status
        speed = rate(float(status.get("tokens_s") or 0.0))
        held = f"v{status.get('version', '-')}, {status.get('running', 0)} running, {status.get('queued', 0)} queued"
        rows.append(
            (process.name.removeprefix("generator-"), speed, f"{doing(process, now)}; {held}", idle(process.idle_now()))
        )
    return rows


def waiting(history: History, now: float) -> str:
    """The broker's one line about what, from whom, since when; empty when it is old news."""
    if now - history.waiting.get("t", 0.0) > 3.0:
        return ""
    return str(history.waiting.get("text", ""))


def plain_line(history: History, config: Config, now: float) -> str:
    """Everything in one line, for logs that are not a terminal."""
    generators = [p for p in history.those("generator-") if now - p.seen <= SILENT_S]
    speed = sum(float(p.status.get("tokens_s") or 0.0) for p in generators)
    parts = [headline(history, config, now), learning(history, config).replace("   ", ", ")]
    if learner := history.processes.get(LEARNER):
        parts.append(f"learner {rate(learner_rate(history))}, {doing(learner, now)}, {idle(learner.idle_now())}")
    parts.append(f"{len(generators)} generators {rate(speed)}")
    return " | ".join(part for part in [*parts, waiting(history, now)] if part)
