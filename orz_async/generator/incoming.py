"""The weights on their way to the engine: what is wanted, what has arrived, and whether it may be served yet."""

from __future__ import annotations

from collections.abc import Callable

from orz_async.weights.protocol import Fetcher, Snapshot

EVAL_PIN_S = 10.0
"""Newer weights wait this long for a running evaluation to end, so that one version samples all of it; then they are
served in flight, and the spans of its rollouts say so. Longer, and evaluating would hold up training."""


class IncomingWeights:
    """Weights of one learner epoch.

    consumes   versions announced by the broker       waits for   nothing
    produces   the newest snapshot, when it may be served
    ends       with `close`, which closes the fetcher
    """

    def __init__(self, fetcher: Fetcher, clock: Callable[[], float], pin_s: float = EVAL_PIN_S) -> None:
        self._fetcher = fetcher
        self._clock = clock
        self._pin_s = pin_s
        self._wanted = -1
        self._sources: tuple[str, ...] = ()
        self._arrived: Snapshot | None = None
        self._pinned_since: float | None = None
        self.served = -1
        """Version in the engine; -1 before the first of this epoch."""

    def want(self, version: int, digest: str = "", sources: tuple[str, ...] = ()) -> None:
        """The broker says this version, with this digest, can be fetched, and where."""
        if version > self._wanted or sources not in ((), self._sources):
            self._wanted = max(version, self._wanted)
            self._sources = sources or self._sources
            self._fetcher.want(version, digest, sources)

    @property
    def is_behind(self) -> bool:
        """A newer version than the one served is known."""
        return self.served < self._wanted

    def take(self, *, is_evaluating: bool) -> Snapshot | None:
        """The snapshot to serve now; None if there is none, or if it has to wait for an evaluation."""
        self._arrived = self._fetcher.poll() or self._arrived
        if self._arrived is None:
            return None
        if is_evaluating and self._is_pinned():
            return None
        snapshot, self._arrived, self._pinned_since = self._arrived, None, None
        return snapshot if snapshot.version > self.served else None

    def _is_pinned(self) -> bool:
        now = self._clock()
        if self._pinned_since is None:
            self._pinned_since = now
        return now - self._pinned_since < self._pin_s

    def waiting_for(self) -> str:
        return self._fetcher.waiting_for()

    def close(self) -> None:
        self._fetcher.close()
