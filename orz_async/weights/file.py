"""Weights through a shared file system: safetensors, a manifest beside it, one atomic rename.

    DIRECTORY/epoch-3/version-17/weights.safetensors     never changed after the rename that made it visible
    DIRECTORY/epoch-3/version-17/manifest.json           names, dtypes, shapes and checksums of every tensor
    DIRECTORY/epoch-3/LATEST                             "17", replaced atomically

Full versions only. Nothing is synced to the disk: after a crash of the machine the learner publishes anew, and a torn
file does not pass its checksums.
"""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orz_async.errors import DiskError, PeerLostError, WireError
from orz_async.weights.digests import Digests
from orz_async.weights.manifest import Limits, check_specs
from orz_async.weights.protocol import EventSink, PublishReport, Snapshot
from orz_async.weights.snapshot import State, TensorSpec, capture, spec_of
from orz_async.weights.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

SCHEME = "file://"
KEPT = 2
"""Versions kept: the newest, and the one that is perhaps being read."""
POLL_S = 0.2
MAX_MANIFEST_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20
MAX_DAMAGED = 3


class FileManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    digest: str
    tensors: tuple[TensorSpec, ...]


FORMAT = "orz-weights-1"


def _directory(address: str, epoch: int) -> Path:
    return Path(address.removeprefix(SCHEME)) / f"epoch-{epoch}"


class FilePublisher:
    """Writes each version it is given, or only the newest when they come faster than the disk takes them.

    consumes  versions from `publish`      waits for  one, or close
    produces  a directory a version         waits for  the disk
    ends      with `close`
    """

    def __init__(self, bind: str, epoch: int, events: EventSink) -> None:
        self.address = bind
        self._root = _directory(bind, epoch)
        self._handover: State | None = None
        self._version = -1
        self._lock = threading.Lock()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"cannot write weights to {self._root}: {error.strerror}; choose another folder") from error
        self._worker = Worker(f"weights-writer-{epoch}", self._loop, lambda: None, events)
        self._worker.start()

    def publish(self, version: int, named: Iterable[tuple[str, Tensor]]) -> PublishReport:
        """Copy the tensors; they are written while the caller goes on."""
        self._worker.check()
        if version <= self._version:
            raise ValueError(f"expected a version newer than {self._version}, got {version}")
        started = time.monotonic()
        state = capture(version, named)
        with self._lock:
            self._handover, self._version = state, version
        self._worker.wake()
        seconds = time.monotonic() - started
        return PublishReport(version=version, bytes=state.num_bytes, seconds=seconds, digest=state.digest)

    def close(self) -> None:
        """Finish writing what was published."""
        self._worker.close()

    def _loop(self) -> None:
        while True:
            with self._lock:
                state, self._handover = self._handover, None
            if state is not None:
                try:
                    self._write(state)
                except OSError as error:
                    raise DiskError(f"cannot write weights to {self._root}: {error.strerror}") from error
            elif self._worker.closing:
                return
            else:
                select.select([self._worker.wake_fd], [], [])
                self._worker.drain()

    def _write(self, state: State) -> None:
        from safetensors.torch import save_file

        target = self._root / f"version-{state.version}"
        fresh = self._root / f".fresh-{state.version}-{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(state.tensors, fresh / "weights.safetensors")
        manifest = FileManifest(FORMAT, state.version, state.digest, state.specs)
        (fresh / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        shutil.rmtree(target, ignore_errors=True)  # of an earlier process of the same epoch
        fresh.rename(target)
        pointer = self._root / ".LATEST"
        pointer.write_text(str(state.version))
        pointer.replace(self._root / "LATEST")
        versions = sorted(int(path.name.removeprefix("version-")) for path in self._root.glob("version-*"))
        for version in versions[:-KEPT]:
            shutil.rmtree(self._root / f"version-{version}", ignore_errors=True)


class FileFetcher:
    """Reads the newest version when one is wanted.

    consumes  `want`, LATEST                   waits for  LATEST to name a version that is new enough, POLL_S at a time
    produces  verified snapshots for `poll`     waits for  nothing: only the newest is kept
    ends      with `close`, or with an error that `poll` raises
    """

    def __init__(
        self, address: str, epoch: int, events: EventSink, *, limits: Limits | None = None, give_up_s: float = 600.0
    ) -> None:
        self._root, self._epoch = _directory(address, epoch), epoch
        self._limits, self._give_up_s = limits if limits is not None else Limits(), give_up_s
        self._wanted = self._held = -1
        self._since = 0.0
        self._digests = Digests()
        self._damaged = 0
        self._note = ""
        self._ready: Snapshot | None = None
        self._lock = threading.Lock()
        self._worker = Worker(f"weights-reader-{epoch}", self._loop, lambda: None, events)
        self._worker.start()

    def want(self, version: int, digest: str = "", sources: Sequence[str] = ()) -> None:
        """Read the newest version, at least this one. There is one source: the folder."""
        with self._lock:
            self._digests.learn(version, digest)
            if self._held >= self._wanted:
                self._since = time.monotonic()
            self._wanted = max(self._wanted, version)
        self._worker.wake()

    def poll(self) -> Snapshot | None:
        with self._lock:
            ready, self._ready = self._ready, None
        if ready is None:
            self._worker.check()
        return ready

    def waiting_for(self) -> str:
        if self._held >= self._wanted:
            return "no newer weights are wanted"
        waited, note = time.monotonic() - self._since, f"; {self._note}" if self._note else ""
        return f"waiting for weights version {self._wanted} in {self._root} for {waited:.1f} s{note}"

    def close(self) -> None:
        self._worker.close()

    def _loop(self) -> None:
        while not self._worker.closing:
            behind = self._wanted > self._held
            if select.select([self._worker.wake_fd], [], [], POLL_S if behind else None)[0]:
                self._worker.drain()
            if self._wanted > self._held and not self._worker.closing:
                self._try()

    def _try(self) -> None:
        if time.monotonic() - self._since > self._give_up_s:
            raise PeerLostError(f"{self.waiting_for()}; gave up after {self._give_up_s:.0f} s")
        try:
            latest = (self._root / "LATEST").read_text()[:20]
            if not latest.isdecimal() or int(latest) < self._wanted:
                self._note = f"the newest is {latest!r}"
                return
            snapshot = self._read(self._root / f"version-{int(latest)}")
        except OSError as error:  # not there yet, or removed while it was read: the next turn sees the newest
            self._note = str(error)
            return
        except WireError as error:
            self._damaged += 1
            self._note = str(error)
            if self._damaged >= MAX_DAMAGED:
                raise
            return
        with self._lock:
            self._ready, self._held = snapshot, snapshot.version
        self._damaged, self._note = 0, ""

    def _read(self, path: Path) -> Snapshot:
        started = time.monotonic()
        if (path / "manifest.json").stat().st_size > MAX_MANIFEST_BYTES:
            raise WireError(f"{path}/manifest.json is over the limit of {MAX_MANIFEST_BYTES} bytes")
        try:
            manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=FileManifest)
        except (msgspec.MsgspecError, ValueError) as error:  # msgspec lets UnicodeDecodeError through
            raise WireError(f"{path}/manifest.json: {error}") from error
        if manifest.format != FORMAT:
            raise WireError(f"{path}/manifest.json: expected format {FORMAT!r}, got {manifest.format[:32]!r}")
        try:
            num_bytes = check_specs(manifest.tensors, manifest.digest, self._limits)
        except WireError as error:
            raise WireError(f"{path}/manifest.json: {error}") from error
        self._digests.require(manifest.version, manifest.digest, str(path))
        tensors = self._tensors(path / "weights.safetensors", manifest.tensors, num_bytes)
        return Snapshot(
            version=manifest.version,
            epoch=self._epoch,
            tensors=tensors,
            digest=manifest.digest,
            bytes=num_bytes,
            fetch_s=time.monotonic() - started,
            source=str(path),
            specs=manifest.tensors,
        )

    def _tensors(self, path: Path, specs: Iterable[TensorSpec], num_bytes: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        if path.stat().st_size > num_bytes + MAX_HEADER_BYTES:
            raise WireError(f"{path}: expected {num_bytes} bytes of tensors, the file has {path.stat().st_size}")
        tensors: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for spec in specs:
                    tensor = file.get_tensor(spec.name).clone()  # not a map of a file that may change
                    found = spec_of(spec.name, tensor)
                    if found != spec:
                        raise WireError(f"{path}: tensor {spec.name!r}: expected {spec}, found {found}")
                    tensors[spec.name] = tensor
        except (SafetensorError, ValueError) as error:
            raise WireError(f"{path}: {error}") from error
        return tensors
