"""The learner's half of the nccl transport: one thread and one group for each generator, none waits for another."""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from orz_async.weights import group as groups
from orz_async.weights.group import Group, GroupError
from orz_async.weights.payload import full_payload
from orz_async.weights.protocol import EventSink, PublishReport
from orz_async.weights.snapshot import State, capture
from orz_async.weights.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

BUCKET_BYTES = 16 << 20
"""Of one broadcast. On a GPU it is staged there: the published copy stays in host memory, as for every transport."""
MAX_MEMBERS = 1024
"""Generators that may join in one life of the learner, those that join again counted again."""
OK = "ok "


class NcclPublisher:
    """Sends the newest version to each generator that wants one.

    consumes  versions from `publish`, wishes from the store      waits for  a counter of the store, POLL_S at a time
    produces  a transfer to each member, in that member's thread   waits for  its member, `deadline_s` an operation
    ends      with `close`

    A member that dies, freezes, or refuses what it got is expelled: its group is aborted, an event says why, and the
    others do not notice. One that lives after all joins again under another number.
    """

    def __init__(
        self, bind: str, epoch: int, events: EventSink, *, device: str = "cpu", deadline_s: float = 15.0
    ) -> None:
        """device: where the buckets are sent from; cuda means NCCL, cpu gloo."""
        self._epoch, self._events, self._device, self._deadline_s = epoch, events, device, deadline_s
        self._backend = "gloo" if device == "cpu" else "nccl"
        self._store, self.address = groups.listen(bind, epoch, self._backend)
        self._newest: State | None = None
        self._calls = 0
        self._changed = threading.Condition()
        """Of `_newest` and `_calls`; members wait on it."""
        self._members: list[threading.Thread] = []
        self.bytes_sent = 0
        self._worker = Worker(f"weights-groups-{epoch}", self._watch, self._release, events)
        self._worker.start()

    def publish(self, version: int, named: Iterable[tuple[str, Tensor]]) -> PublishReport:
        """Copy the tensors and offer them as `version`, which must be newer than the last one."""
        self._worker.check()
        if self._newest is not None and version <= self._newest.version:
            raise ValueError(f"expected a version newer than {self._newest.version}, got {version}")
        started = time.monotonic()
        state = capture(version, named)
        with self._changed:
            self._newest = state
            self._changed.notify_all()
        seconds = time.monotonic() - started
        return PublishReport(version=version, bytes=state.num_bytes, seconds=seconds, digest=state.digest)

    def close(self) -> None:
        """End all transfers and the store; an operation under way with a frozen member is given its deadline.

        Generators learn of a new learner from the broker.
        """
        self._worker.close()

    def _release(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for member in self._members:
            member.join()
        del self._store

    def _watch(self) -> None:
        """Start a thread for each member that joins; wake them all when one of them wants something."""
        while not self._worker.closing:
            if select.select([self._worker.wake_fd], [], [], groups.POLL_S)[0]:
                self._worker.drain()
                continue
            joined, calls = self._store.add("members", 0), self._store.add("calls", 0)
            while len(self._members) < min(joined, MAX_MEMBERS):
                number = len(self._members) + 1
                thread = threading.Thread(target=self._serve, args=(number,), name=f"weights-{number}", daemon=True)
                self._members.append(thread)
                thread.start()
            if calls != self._calls:
                with self._changed:
                    self._calls = calls
                    self._changed.notify_all()

    def _serve(self, member: int) -> None:
        """One member, from its group to its end."""
        held, group, store = -1, None, None
        try:
            store = groups.join(self.address)
            group = Group(
                store, member, 0, self.address, backend=self._backend, device=self._device, deadline_s=self._deadline_s
            )
            number = 0
            while (state := self._wanted(store, member, held)) is not None:
                number += 1
                self._send(store, group, f"member/{member}", number, state)
                held = state.version
        except (GroupError, RuntimeError) as error:  # RuntimeError: torch's store raises nothing narrower
            if not self._worker.closing:
                self._expel(member, store, held, str(error))
        finally:
            if group is not None:
                group.close()

    def _wanted(self, store: Store, member: int, held: int) -> State | None:
        """The newest version as soon as the member wants it; None at the end."""
        while True:
            with self._changed:
                calls, newest = self._calls, self._newest
            if self._worker.closing:
                return None
            wish = groups.peek(store, f"member/{member}/want") or ""
            want = int(wish) if wish.isdecimal() and len(wish) < 20 else -1
            if newest is not None and held < want <= newest.version:
                return newest
            with self._changed:
                self._changed.wait_for(
                    lambda: self._worker.closing or self._calls != calls or self._newest is not newest  # noqa: B023
                )

    def _send(self, store: Store, group: Group, prefix: str, number: int, state: State) -> None:
        """Announce, manifest, buckets, and the digest that came out of them on the other side."""
        import torch

        began = time.monotonic()
        payload = full_payload(state, chunk_bytes=BUCKET_BYTES)
        manifest = bytearray(msgspec.msgpack.encode(payload.manifest))
        store.set(f"{prefix}/go/{number}", str(len(manifest)))
        group.broadcast(torch.frombuffer(manifest, dtype=torch.uint8).to(self._device), self._is_closing)
        bucket = torch.empty(min(BUCKET_BYTES, payload.manifest.payload_bytes), dtype=torch.uint8)
        for index in range(payload.manifest.num_chunks):
            data = payload.chunk(index).data
            bucket.numpy()[: len(data)] = np.frombuffer(data, np.uint8)
            group.broadcast(bucket[: len(data)].to(self._device), self._is_closing)
            with self._changed:
                self.bytes_sent += len(data)
        answer = self._answer(store, f"{prefix}/ack/{number}")
        if answer != OK + state.digest:
            raise GroupError(f"expected it to hold digest {state.digest}, it answered {answer[:300]!r}")
        for key in ("go", "ack"):
            store.delete_key(f"{prefix}/{key}/{number}")
        self._events.emit(
            "weights_sent",
            member=groups.peek(store, f"{prefix}/name"),
            version=state.version,
            bytes=payload.manifest.payload_bytes,
            seconds=time.monotonic() - began,
        )

    def _answer(self, store: Store, key: str) -> str:
        end = time.monotonic() + self._deadline_s
        while (answer := groups.peek(store, key)) is None:
            if self._worker.closing or time.monotonic() > end:
                raise GroupError(f"it did not confirm within {self._deadline_s:g} s")
            time.sleep(groups.POLL_S)
        return answer

    def _is_closing(self) -> bool:
        return self._worker.closing

    def _expel(self, member: int, store: Store | None, held: int, reason: str) -> None:
        name = None
        if store is not None:
            with contextlib.suppress(RuntimeError):  # the store may be what failed
                name = groups.peek(store, f"member/{member}/name")
                store.set(f"member/{member}/out", reason)
        self._events.emit("weights_expelled", member=name or str(member), held=held, reason=reason)
