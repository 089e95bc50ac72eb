"""The events of a run folded into the numbers of its report: the page draws these, `orz report --json` prints them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from orz_async.config import Config
from orz_async.observe.history import LEARNER, History
from orz_async.observe.summary import summarise
from orz_async.observe.tail import Event
from orz_async.report.timeline import Timelines

MOST_POINTS = 2000
"""Of a curve; a longer run is averaged over neighbouring steps."""
MOST_INCIDENTS = 400
RATE_S = 5.0
"""Seconds that a rate looks back."""
WINDOWS = 4
"""Parts of the run whose calibration is shown apart."""

SERIES: dict[str, tuple[str, ...]] = {
    "reward": ("reward_mean",),
    "length": ("length_mean",),
    "length_max": ("length_max",),
    "truncated": ("truncated_fraction",),
    "explained_variance": ("explained_variance",),
    "value_loss": ("value", "loss"),
    "value_mean": ("value", "value_mean"),
    "return_mean": ("value", "return_mean"),
    "policy_loss": ("policy", "loss"),
    "ratio_min": ("policy", "ratio_min"),
    "ratio_mean": ("policy", "ratio_mean"),
    "ratio_max": ("policy", "ratio_max"),
    "clip_low": ("policy", "clip_low"),
    "clip_high": ("policy", "clip_high"),
    "kl": ("policy", "kl_k3"),
    "ess": ("policy", "ess"),
    "entropy": ("policy", "entropy"),
    "grad_norm": ("grad_norm",),
    "critic_grad_norm": ("critic_grad_norm",),
    "lr": ("lr",),
    "lag_mean": ("lag_mean",),
    "lag_max": ("lag_max",),
    "mismatch_max": ("mismatch_max",),
    "mismatch_mean": ("mismatch_mean",),
    "step_s": ("step_s",),
}
"""Curve of the report: where its number is in a "step" event."""

_INCIDENTS = frozenset(
    ("joined", "left", "disconnected", "quarantined", "refused", "mismatch", "checkpoint", "run", "thread_failed")
)
_BY_LAG = ("tokens", "ratio", "abs_delta", "outside_clip")


def number(value: object) -> float | int | None:
    """A finite number with seven significant digits, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.7g}")


def _at(event: Event, path: tuple[str, ...]) -> object:
    value: object = event
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


class Fold:
    """Feed it every event in order of time, then ask for `numbers`."""

    def __init__(self) -> None:
        self.history = History()
        self.timelines = Timelines()
        self._weights: dict[int, list[Event]] = {}
        self._published: dict[int, Event] = {}
        self._sampled: dict[str, int] = {}
        """By generator: tokens its engine has counted."""
        self._sampled_total = 0
        self._sampled_at: dict[int, int] = {}
        """By step: tokens all generators had sampled at its end."""
        self._incidents: list[Event] = []
        self._sinks: dict[str, Event] = {}
        self._kinds: Counter[str] = Counter()
        self._abandoned_tokens = 0
        """Sampled, and then of no use: their leases were lost."""
        self.dropped = 0

    def feed_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._kinds[event["kind"]] += 1
            self.dropped += int(event.get("dropped") or 0)
            self.history.feed(event)
            self._feed(event)

    def _feed(self, event: Event) -> None:
        name, kind = str(event["process"]), event["kind"]
        if kind == "timeline":
            self.timelines.feed(event)
        elif kind == "throughput":
            now, before = int(event.get("tokens") or 0), self._sampled.get(name, 0)
            self._sampled_total += now - before if now >= before else now
            self._sampled[name] = now
        elif kind == "process":
            self._sampled.pop(name, None)
        elif kind == "weights" and name.startswith("generator-"):
            self._weights.setdefault(int(event["version"]), []).append(event)
        elif kind == "published" and name == LEARNER:
            self._published[int(event["version"])] = event
        elif kind == "step" and name == LEARNER:
            self._sampled_at[int(event["step"])] = self._sampled_total
        elif kind == "abandoned":
            self._abandoned_tokens += int(event.get("tokens") or 0)
        elif kind == "sink":
            self._sinks[str(event.get("name"))] = event
        if kind in _INCIDENTS and len(self._incidents) < MOST_INCIDENTS:
            told = {
                k: v for k, v in event.items() if k not in ("v", "m", "versions") and isinstance(v, str | int | float)
            }
            self._incidents.append(told)

    def numbers(self, name: str, config: Config, config_hash: str) -> dict[str, Any]:
        """Everything the page shows of this run but its rollouts, as plain data."""
        history, notes = self.history, []
        steps = [history.steps[step] for step in sorted(history.steps)]
        stride = max(1, -(-len(steps) // MOST_POINTS))
        if stride > 1:
            notes.append(f"curves are means over {stride} neighbouring steps of {len(steps):,}")
        if self.dropped:
            notes.append(f"{self.dropped:,} events were lost because the disk refused them")
        for sink, event in self._sinks.items():
            if event.get("dropped") or event.get("failure"):
                why = f" ({event['failure']})" if event.get("failure") else ""
                notes.append(f"{int(event.get('dropped') or 0):,} points were not delivered to {sink}{why}")
        timeline = self.timelines.result()
        if len(timeline["processes"]) < timeline["num_processes"]:
            notes.append(f"the timeline shows {len(timeline['processes'])} of {timeline['num_processes']} processes")
        summary = msgspec.to_builtins(summarise(history, config, config_hash))
        evals = summary.pop("evals")
        tokens_at = _running_tokens(steps)
        return {
            "name": name,
            "planned_steps": config.steps,
            "rollouts_per_step": config.broker.rollouts_per_step,
            "clip": [config.learner.clip_low, config.learner.clip_high],
            "summary": summary,
            "evals": [e | {"tokens": tokens_at.get(e["version"] - 1, 0)} for e in evals],
            "series": self._series(steps, stride),
            "verdicts": _by_name(steps, "verdicts", stride, fill=0),
            "step_seconds": _by_name(steps, "seconds", stride, fill=0),
            "by_lag": _by_lag(steps, stride),
            "lag_histogram": _lag_histogram(steps),
            "calibration": _calibration(steps),
            "idle": {
                process.name: process.time.read(history.lives[-1].window if history.lives else None)[1]
                for prefix in ("learner-", "generator-")
                for process in history.those(prefix)
            },
            "timeline": timeline,
            "funnel": _funnel(history.funnel) | {"abandoned_tokens": self._abandoned_tokens},
            "weights": self._weight_rows(),
            "incidents": self._incidents,
            "events": dict(self._kinds.most_common()),
            "notes": notes,
        }

    def _series(self, steps: list[Event], stride: int) -> dict[str, list[Any]]:
        tokens_at = _running_tokens(steps)
        sampled = [self._sampled_at.get(int(e["step"]), 0) for e in steps]
        trained = [tokens_at[int(e["step"])] for e in steps]
        walls = [float(e["wall_s"]) for e in steps]
        columns: dict[str, list[Any]] = {
            "step": [int(e["step"]) + 1 for e in steps],
            "wall_s": walls,
            "tokens": [tokens_at[int(e["step"])] for e in steps],
            "learner_tokens_s": _rates(trained, walls),
            "generator_tokens_s": _rates(sampled, walls),
        }
        columns |= {name: [_at(e, path) for e in steps] for name, path in SERIES.items()}
        last = {"step", "wall_s", "tokens"}
        return {name: _thin(values, stride, last=name in last) for name, values in columns.items()}

    def _weight_rows(self) -> list[dict[str, Any]]:
        """By version: what its publication cost the learner, and what fetching and swapping cost the generators."""
        versions = sorted(self._weights.keys() | self._published.keys())
        stride = max(1, -(-len(versions) // MOST_POINTS))
        rows = []
        for version in versions[::stride]:
            fetched, published = self._weights.get(version, []), self._published.get(version, {})
            row: dict[str, Any] = {"version": version, "generators": len(fetched)}
            row["publish_s"] = number(published.get("seconds"))
            row["model_bytes"] = number(published.get("bytes"))
            row["full"] = sum(int(e.get("base_version", -1)) < 0 for e in fetched)
            for key in ("bytes", "fetch_s", "swap_s"):
                values = [float(e.get(key) or 0.0) for e in fetched]
                row[f"{key}_mean"] = number(sum(values) / len(values)) if values else None
                row[f"{key}_max"] = number(max(values)) if values else None
            rows.append(row)
        return rows


def _running_tokens(steps: list[Event]) -> dict[int, int]:
    """By step: response tokens trained until its end."""
    total, found = 0, {}
    for event in steps:
        total += int(event.get("tokens_trained") or 0)
        found[int(event["step"])] = total
    return found


def _rates(totals: list[int], walls: list[float]) -> list[float | None]:
    """Per second, at each step, over the steps of the last RATE_S seconds: generators report once a second only.

    None where a count began anew, which it does when the learner resumes at an earlier step.
    """
    rates: list[float | None] = []
    first = 0
    for now, (total, wall) in enumerate(zip(totals, walls, strict=True)):
        while first < now - 1 and walls[first + 1] <= wall - RATE_S:
            first += 1
        before, since = (totals[first], walls[first]) if now else (0, 0.0)
        rates.append((total - before) / (wall - since) if wall > since and total >= before else None)
    return rates


def _thin(values: list[Any], stride: int, *, last: bool = False) -> list[Any]:
    """Numbers, averaged over `stride` neighbours (or the last of them); None where there is none."""
    values = [number(value) for value in values]
    if stride == 1:
        return values
    thinned = []
    for start in range(0, len(values), stride):
        part = [value for value in values[start : start + stride] if value is not None]
        thinned.append(None if not part else part[-1] if last else number(sum(part) / len(part)))
    return thinned


def _by_name(steps: list[Event], field: str, stride: int, *, fill: float | None) -> dict[str, list[Any]]:
    """A field that holds numbers by name, as one curve a name."""
    names = sorted({str(name) for e in steps for name in (e.get(field) or {})})
    return {name: _thin([(e.get(field) or {}).get(name, fill) for e in steps], stride) for name in names}


def _by_lag(steps: list[Event], stride: int) -> dict[str, dict[str, list[Any]]]:
    lags = sorted({int(lag) for e in steps for lag in (e.get("by_lag") or {})})
    result = {}
    for lag in map(str, lags):
        curves = {
            name: _thin([((e.get("by_lag") or {}).get(lag) or {}).get(name) for e in steps], stride) for name in _BY_LAG
        }
        rows = [(e.get("mismatch_by_lag") or {}).get(lag) or {} for e in steps]
        curves |= {f"mismatch_{name}": _thin([row.get(name) for row in rows], stride) for name in ("max", "mean")}
        result[lag] = curves
    return result


def _lag_histogram(steps: list[Event]) -> dict[str, int]:
    total: Counter[int] = Counter()
    for event in steps:
        total.update({int(lag): int(n) for lag, n in (event.get("lag_histogram") or {}).items()})
    return {str(lag): total[lag] for lag in sorted(total)}


def _calibration(steps: list[Event]) -> list[dict[str, Any]]:
    """For each part of the run: tokens, mean predicted value and mean return by bin of the predicted value."""
    steps = [e for e in steps if e.get("calibration")]
    parts = []
    for part in range(min(WINDOWS, len(steps))):
        window = steps[len(steps) * part // WINDOWS : len(steps) * (part + 1) // WINDOWS]
        if not window:
            continue
        columns = {
            name: [sum(column) for column in zip(*(e["calibration"][name] for e in window), strict=True)]
            for name in ("tokens", "values", "returns")
        }
        bins = [
            {"tokens": n, "value": number(value / n), "return": number(returned / n)}
            for n, value, returned in zip(*columns.values(), strict=True)
            if n
        ]
        parts.append({"first": int(window[0]["step"]) + 1, "last": int(window[-1]["step"]) + 1, "bins": bins})
    return parts


def _funnel(event: Event) -> dict[str, Any]:
    counts = {name: int(event.get(name) or 0) for name in ("granted", "trained", "quarantined", "in_flight")}
    causes = {str(cause): int(n) for cause, n in (event.get("expired") or {}).items()}
    expired = sum(causes.values())
    rest = counts["granted"] - counts["trained"] - counts["quarantined"] - counts["in_flight"] - expired
    return counts | {"expired": expired, "expired_by_cause": causes, "unaccounted": rest}
