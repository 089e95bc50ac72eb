"""A fetcher that serves what it has, so that the learner sends a version once, however many generators read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orz_async.weights.address import CurveKeys
from orz_async.weights.fetcher import StreamFetcher
from orz_async.weights.manifest import Limits
from orz_async.weights.protocol import EventSink, Snapshot
from orz_async.weights.publisher import StreamPublisher
from orz_async.weights.snapshot import State


class Relay:
    """A Fetcher towards its owner and upstream, a publisher towards whoever connects to `address`.

    A version that somebody downstream wants is fetched from upstream, whether the owner wants it or not. What is
    passed on has been verified here first; it is held once, shared between the owner and the readers.
    """

    def __init__(
        self,
        upstream: str | Sequence[str],
        bind: str,
        epoch: int,
        events: EventSink,
        *,
        keys: CurveKeys | Callable[[], CurveKeys] | None = None,
        serve_keys: CurveKeys | None = None,
        limits: Limits | None = None,
        stall_s: float = 5.0,
        give_up_s: float = 600.0,
    ) -> None:
        """keys: towards upstream. serve_keys: with the list of fetchers that may read from here."""
        self._held = -1
        self._fetcher: StreamFetcher | None = None
        self._publisher = StreamPublisher(
            bind, epoch, events, keys=serve_keys, on_want=self._want_upstream, progress=self._progress
        )
        self._fetcher = StreamFetcher(
            upstream,
            epoch,
            events,
            keys=keys,
            limits=limits,
            stall_s=stall_s,
            give_up_s=give_up_s,
            on_state=self._pass_on,
        )
        self.address = self._publisher.address
        self.traffic = self._publisher.traffic

    @property
    def received_bytes(self) -> int:
        return 0 if self._fetcher is None else self._fetcher.received_bytes

    def _progress(self) -> int:
        return 0 if self._fetcher is None else self._fetcher.progress

    def _want_upstream(self, version: int) -> None:
        """Ask for whatever is newer, one step at most: a reader's number is not trusted to be one that will exist."""
        if self._fetcher is not None:  # one who asks before the constructor returns asks again in a second
            self._fetcher.want(min(version, self._held + 1))

    def _pass_on(self, state: State) -> None:
        self._held = state.version
        self._publisher.offer(state)

    def want(self, version: int, digest: str = "", sources: Sequence[str] = ()) -> None:
        assert self._fetcher is not None
        self._fetcher.want(version, digest, sources)

    def poll(self) -> Snapshot | None:
        assert self._fetcher is not None
        return self._fetcher.poll()

    def waiting_for(self) -> str:
        assert self._fetcher is not None
        return self._fetcher.waiting_for()

    def close(self) -> None:
        assert self._fetcher is not None
        self._fetcher.close()
        self._publisher.close()
