"""What a weight transport looks like from the learner (Publisher) and from a generator (Fetcher)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from orz_async.weights.snapshot import TensorSpec


class EventSink(Protocol):
    """The part of the event log this folder writes to."""

    def emit(self, kind: str, **fields: Any) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishReport:
    """One version, copied out of the learner's parameters."""

    version: int
    bytes: int
    """Size of all tensors."""
    seconds: float
    """Time the caller was held up: copying and checksums."""
    digest: str
    """`state_digest` of what was published; a generator that serves it reports the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One complete, verified version. The tensors must not be written to: the next version is built on them."""

    version: int
    epoch: int
    tensors: dict[str, Tensor]
    digest: str
    bytes: int
    """What travelled for it, which is less than the size of the tensors when a delta did."""
    fetch_s: float
    """From the first chunk asked for until the last checksum; waiting for the version to exist is not in it."""
    base_version: int = -1
    """The version a delta was applied to; -1 when everything was sent."""
    source: str = ""
    """Whom it came from: the learner, or a relay."""
    specs: tuple[TensorSpec, ...] = ()
    """Name, dtype, shape and checksum of every tensor, as the learner announced them."""


class Publisher(Protocol):
    @property
    def address(self) -> str:
        """What a fetcher connects to."""

    def publish(self, version: int, named: Iterable[tuple[str, Tensor]]) -> PublishReport:
        """Copy the tensors and offer them as `version`, which must be newer than the last one."""

    def close(self) -> None: ...


class Fetcher(Protocol):
    def want(self, version: int, digest: str = "", sources: Sequence[str] = ()) -> None:
        """Fetch the newest version, at least this one. A later call with a newer version supersedes.

        digest: of this version in the learner's own words; what claims to be it and is not is refused. "" is unknown.
        sources: where to fetch from, best first, the learner itself last; () leaves that as it was.
        """

    def poll(self) -> Snapshot | None:
        """The newest complete version not handed out yet. Raises what ended the fetcher."""

    def waiting_for(self) -> str:
        """One line: what is awaited, from whom, since when."""

    def close(self) -> None: ...


Tensors = Mapping[str, "Tensor"]
