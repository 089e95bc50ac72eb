"""The generator's half of the nccl transport: joins, says what it wants, receives, checks, confirms."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from orz_async.errors import ConfigError, OrzError, PeerLostError, WireError
from orz_async.weights import group as groups
from orz_async.weights.assembly import Assembly
from orz_async.weights.digests import Digests
from orz_async.weights.group import Group, GroupError
from orz_async.weights.manifest import Limits, check
from orz_async.weights.nccl_publisher import OK
from orz_async.weights.protocol import EventSink, Snapshot
from orz_async.weights.wire import REPLY_BYTES, Manifest
from orz_async.weights.worker import Worker

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BACKOFF_S = (0.1, 5.0)
MAX_DAMAGED = 3
"""Damaged transfers in a row before giving up."""
_decoder = msgspec.msgpack.Decoder(Manifest)


class NcclFetcher:
    """Fetches the newest version whenever one is wanted.

    consumes  `want`, broadcasts of the learner        waits for  a key of the store, POLL_S at a time; `deadline_s` a
                                                                  broadcast
    produces  verified snapshots for `poll`             waits for  nothing: only the newest is kept
    ends      with `close`, or with an error that `poll` raises

    Whatever goes wrong with the group, it leaves and joins again under another number.
    """

    def __init__(
        self,
        address: str,
        epoch: int,
        events: EventSink,
        *,
        device: str = "cpu",
        deadline_s: float = 15.0,
        limits: Limits | None = None,
        give_up_s: float = 600.0,
    ) -> None:
        self._address, self._epoch, self._events = address, epoch, events
        self._device, self._deadline_s, self._give_up_s = device, deadline_s, give_up_s
        self._limits = limits if limits is not None else Limits()
        self._digests = Digests()
        self._lock = threading.Lock()
        self._ready: Snapshot | None = None
        self._wanted = self._held = -1
        self._since = self._heard = time.monotonic()
        self._note = ""
        self._store: Store | None = None
        self._group: Group | None = None
        self._prefix = ""
        self._told = self._transfers = self._damaged = self._rests = 0
        groups.host_and_port(address)
        self._worker = Worker(f"weights-fetcher-{epoch}", self._loop, self._leave, events)
        self._worker.start()

    def want(self, version: int, digest: str = "", sources: Sequence[str] = ()) -> None:
        """Fetch the newest version, at least this one. There is one source: the learner."""
        with self._lock:
            self._digests.learn(version, digest)
            if self._held >= self._wanted:
                self._since = self._heard = time.monotonic()
            self._wanted = max(self._wanted, version)
        self._worker.wake()

    def poll(self) -> Snapshot | None:
        """The newest complete version not handed out yet. Raises what ended the fetcher."""
        with self._lock:
            ready, self._ready = self._ready, None
        if ready is None:
            self._worker.check()
        return ready

    def waiting_for(self) -> str:
        """One line: what is awaited, from whom, since when."""
        if self._held >= self._wanted:
            return "no newer weights are wanted"
        now, note = time.monotonic(), f"; {self._note}" if self._note else ""
        return (
            f"waiting for weights version {self._wanted} from {self._address} for {now - self._since:.1f} s, "
            f"last heard of {now - self._heard:.1f} s ago{note}"
        )

    def close(self) -> None:
        self._worker.close()

    def _loop(self) -> None:
        pause: float | None = None
        while not self._worker.closing:
            if select.select([self._worker.wake_fd], [], [], pause)[0]:
                self._worker.drain()
            pause = None
            if self._wanted <= self._held or self._worker.closing:
                continue
            try:
                self._turn()
                pause = groups.POLL_S
            except (GroupError, RuntimeError) as error:  # RuntimeError: torch's store raises nothing narrower
                pause = self._stumble(error)

    # The store is never in a local variable: the traceback of an error would keep its connection open.

    @property
    def _joined(self) -> Store:
        assert self._store is not None
        return self._store

    def _peek(self, key: str) -> str | None:
        return groups.peek(self._joined, f"{self._prefix}/{key}")

    def _turn(self) -> None:
        """Join if need be, say what is wanted, receive what is offered."""
        if self._group is None:
            self._join()
        if self._told < self._wanted:
            self._told = self._wanted
            self._joined.set(f"{self._prefix}/want", str(self._told))
            self._joined.add("calls", 1)
        if (size := self._peek(f"go/{self._transfers + 1}")) is not None:
            self._transfers += 1
            self._receive(int(size))
        elif (reason := self._peek("out")) is not None:
            raise GroupError(f"the learner expelled this generator: {reason}")
        self._heard = time.monotonic()

    def _join(self) -> None:
        self._store = groups.join(self._address)
        if (epoch := groups.peek(self._joined, "epoch")) != str(self._epoch):
            raise GroupError(f"expected a learner of epoch {self._epoch} at {self._address}, found epoch {epoch}")
        backend = groups.peek(self._joined, "backend") or ""
        if backend != ("gloo" if self._device == "cpu" else "nccl"):
            raise ConfigError(
                f"the learner sends weights with {backend}, this engine's device is {self._device}: with "
                "weights.transport = nccl both sides need a GPU of their own or neither; use stream otherwise"
            )
        member = self._joined.add("members", 1)
        self._prefix, self._told, self._transfers = f"member/{member}", -1, 0
        self._joined.set(f"{self._prefix}/name", groups.self_name())
        self._group = Group(
            self._joined, member, 1, self._address, backend=backend, device=self._device, deadline_s=self._deadline_s
        )

    def _receive(self, manifest_bytes: int) -> None:
        """One transfer. What arrived is confirmed by its digest, what cannot be used is answered with the reason."""
        began, ack = time.monotonic(), f"{self._prefix}/ack/{self._transfers}"
        try:
            snapshot = self._assemble(manifest_bytes, began)
        except GroupError:
            raise
        except WireError as error:
            self._joined.set(ack, f"refused: {error}")
            self._events.emit("weights_frame_refused", reason=str(error), peer=self._address)
            self._damaged += 1
            if self._damaged >= MAX_DAMAGED:
                raise
            raise GroupError(str(error)) from error
        self._joined.set(ack, OK + snapshot.digest)
        with self._lock:
            self._ready, self._held = snapshot, snapshot.version
        self._damaged, self._rests, self._note = 0, 0, ""

    def _assemble(self, manifest_bytes: int, began: float) -> Snapshot:
        if not 0 < manifest_bytes <= REPLY_BYTES:
            raise WireError(f"expected a manifest of 1 to {REPLY_BYTES} bytes, got {manifest_bytes}")
        try:
            manifest = _decoder.decode(self._take(manifest_bytes))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # msgspec lets UnicodeDecodeError through
            raise WireError(f"malformed manifest: {error}") from error
        check(manifest, limits=self._limits)
        self._digests.require(manifest.version, manifest.digest, self._address)
        if manifest.base_digest:
            raise WireError(f"expected a full version, got one on top of {manifest.base_digest[:16]!r}")
        assembly = Assembly(manifest, None)
        while not assembly.complete:
            assembly.feed(self._take(manifest.chunk_length(assembly.next_chunk)))
        state = assembly.state()
        return Snapshot(
            version=state.version,
            epoch=self._epoch,
            tensors=state.tensors,
            digest=state.digest,
            bytes=manifest.payload_bytes,
            fetch_s=time.monotonic() - began,
            source=self._address,
            specs=state.specs,
        )

    def _take(self, num_bytes: int) -> memoryview:
        import torch

        assert self._group is not None
        tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast(tensor, lambda: self._worker.closing)
        view: memoryview = tensor.cpu().numpy().data
        return view

    def _stumble(self, error: OrzError | RuntimeError) -> float:
        """Leave the group; how long to rest before joining again."""
        self._leave()
        if self._worker.closing:
            return 0.0
        self._note = str(error)
        waited = time.monotonic() - self._heard
        if waited > self._give_up_s:
            raise PeerLostError(f"{self.waiting_for()}; gave up after {self._give_up_s:.0f} s without an answer")
        self._events.emit("weights_reconnect", reason=self._note, peer=self._address)
        self._rests += 1
        first, longest = BACKOFF_S
        return min(longest, first * 2.0 ** min(self._rests - 1, 16))

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._store = None
