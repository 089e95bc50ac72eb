"""Alarms with names: what in a step's own figures says that training goes wrong before the reward does.

consumes  the fields of a "step" event        produces  `Alarm`s, and by how much the staleness bound is lowered

Their choice follows what collapsed in published runs at small lag: the effective sample size stayed at 0.99 while
responses ran into the length limit, so truncation and length are watched and it is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orz_async.config import GuardConfig

Name = Literal["truncation_rate", "length_drift", "entropy_collapse", "mismatch_kl", "clip_mass"]

_MEMORY = 20
"""Steps that the averages of length and entropy look back."""
_ENOUGH = 5
"""Steps before which they raise no alarm."""


@dataclass(frozen=True, slots=True)
class Alarm:
    name: Name
    found: float
    limit: float
    words: str


@dataclass(slots=True)
class Alarms:
    """The state is the last 20 steps; a resumed run begins without it."""

    config: GuardConfig
    max_lag: int
    _lengths: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    _entropies: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    _tight_until: dict[str, int] = field(default_factory=dict)

    def look(self, step: Mapping[str, Any]) -> list[Alarm]:
        """The alarms of this step, which then becomes part of the averages."""
        found = list(self._look(step))
        self._lengths.append(step["length_mean"])
        if step["policy"]["tokens"]:
            self._entropies.append(step["policy"]["entropy"])
        for alarm in found:
            if alarm.name in self.config.tighten:
                self._tight_until[alarm.name] = step["version"] + self.config.tighten_steps
        return found

    def tightening(self, version: int) -> int:
        """By how much S is lowered at this version: one for each alarm that asks for it, at most to 0."""
        return min(self.max_lag, sum(until > version for until in self._tight_until.values()))

    def _look(self, step: Mapping[str, Any]) -> Iterator[Alarm]:
        config = self.config
        if (limit := config.truncated_above) is not None and (share := step["truncated_fraction"]) > limit:
            yield Alarm("truncation_rate", share, limit, f"{share:.0%} of the rollouts ran into the length limit")
        if (limit := config.length_drift_above) is not None and len(self._lengths) >= _ENOUGH:
            usual = sum(self._lengths) / len(self._lengths)
            drift = max(step["length_mean"] / usual, usual / step["length_mean"])
            if drift > limit:
                words = f"mean length {step['length_mean']:.1f}, over the last {len(self._lengths)} steps {usual:.1f}"
                yield Alarm("length_drift", drift, limit, words)
        if (limit := config.entropy_below) is not None and len(self._entropies) >= _ENOUGH:
            usual, now = sum(self._entropies) / len(self._entropies), step["policy"]["entropy"]
            if step["policy"]["tokens"] and now < limit * usual:
                words = f"entropy {now:.3g}, over the last {len(self._entropies)} steps {usual:.3g}"
                yield Alarm("entropy_collapse", now / usual, limit, words)
        if (limit := config.mismatch_kl_above) is not None and (kl := step["mismatch_k3"]) > limit:
            yield Alarm("mismatch_kl", kl, limit, f"KL(engine || learner) {kl:.3g} at equal weights")
        if (limit := config.clip_mass_above) is not None:
            for lag, row in step["by_lag"].items():
                if (mass := row["outside_clip"]) > limit:
                    yield Alarm("clip_mass", mass, limit, f"{mass:.0%} of the tokens of lag {lag} are outside the clip")
                    break
