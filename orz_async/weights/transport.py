"""Which transport an address means: tcp:// and ipc:// the stream, file:// a shared folder."""

from __future__ import annotations

from orz_async.errors import ConfigError
from orz_async.weights.address import CurveKeys
from orz_async.weights.file import SCHEME, FileFetcher, FilePublisher
from orz_async.weights.manifest import Limits
from orz_async.weights.protocol import EventSink, Fetcher, Publisher
from orz_async.weights.stream import StreamFetcher, StreamPublisher


def serve(bind: str, epoch: int, events: EventSink, *, keys: CurveKeys | None = None, history: int = 8) -> Publisher:
    """A publisher at `bind`; its `address` is what `connect` takes."""
    if bind.startswith(SCHEME):
        return FilePublisher(bind, epoch, events)
    _require_stream(bind)
    return StreamPublisher(bind, epoch, events, keys=keys, history=history)


def connect(
    address: str,
    epoch: int,
    events: EventSink,
    *,
    keys: CurveKeys | None = None,
    limits: Limits | None = None,
    give_up_s: float = 600.0,
) -> Fetcher:
    """A fetcher from `address`; several addresses of one run, comma separated, are tried in turn."""
    if address.startswith(SCHEME):
        return FileFetcher(address, epoch, events, limits=limits, give_up_s=give_up_s)
    addresses = address.split(",")
    for one in addresses:
        _require_stream(one)
    return StreamFetcher(addresses, epoch, events, keys=keys, limits=limits, give_up_s=give_up_s)


def _require_stream(address: str) -> None:
    if not address.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"expected a weights address with tcp://, ipc:// or file://, got {address!r}")
