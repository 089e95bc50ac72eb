"""Which transport an address means: tcp:// and ipc:// the stream, file:// a shared folder, nccl:// process groups.

The learner chooses by configuration; a generator learns the address from the broker and follows.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from orz_async.config import WeightsConfig
from orz_async.errors import ConfigError
from orz_async.weights import file, group
from orz_async.weights.address import CurveKeys, is_loopback
from orz_async.weights.file import FileFetcher, FilePublisher
from orz_async.weights.manifest import Limits
from orz_async.weights.nccl_fetcher import NcclFetcher
from orz_async.weights.nccl_publisher import NcclPublisher
from orz_async.weights.protocol import EventSink, Fetcher, Publisher
from orz_async.weights.relay import Relay
from orz_async.weights.stream import StreamFetcher, StreamPublisher


def bind_of(settings: WeightsConfig, *, broker_bind: str, run_dir: Path) -> str:
    """Where the learner offers weights: on the interface its broker listens on, or in the shared folder."""
    host = broker_bind.rpartition(":")[0].partition("://")[2]
    match settings.transport:
        case "file":
            return f"{file.SCHEME}{Path(settings.directory or run_dir / 'weights').absolute()}"
        case "nccl":
            if not is_loopback(f"tcp://{host}:0") and not settings.trusted_network:
                raise ConfigError(
                    f"weights.transport = nccl would listen on {host}, where it neither authenticates nor encrypts: "
                    "set weights.trusted_network if only trusted machines reach it, or use stream"
                )
            return f"{group.SCHEME}{host}:{settings.port}"
        case "stream":
            return f"tcp://{host}:{settings.port}"


def serve(
    bind: str,
    epoch: int,
    events: EventSink,
    *,
    keys: CurveKeys | None = None,
    settings: WeightsConfig | None = None,
    device: str = "cpu",
) -> Publisher:
    """A publisher at `bind`; its `address` is what `connect` takes. device: of the learner's rank 0, for nccl."""
    settings = settings if settings is not None else WeightsConfig()
    if bind.startswith(file.SCHEME):
        return FilePublisher(bind, epoch, events)
    if bind.startswith(group.SCHEME):
        return NcclPublisher(bind, epoch, events, device=device, deadline_s=settings.deadline_s)
    _require_stream(bind)
    return StreamPublisher(bind, epoch, events, keys=keys, history=settings.history)


def connect(
    address: str,
    epoch: int,
    events: EventSink,
    *,
    keys: CurveKeys | Callable[[], CurveKeys] | None = None,
    limits: Limits | None = None,
    give_up_s: float = 600.0,
    device: str = "cpu",
    deadline_s: float = 15.0,
    relay: str = "",
    relay_keys: CurveKeys | None = None,
) -> Fetcher:
    """A fetcher from `address`; several sources, comma separated, are relays and at last the learner.

    device: of the engine, deadline_s: of one operation, both for nccl.
    relay: with the stream, where to offer what was fetched to others; "" nowhere.
    relay_keys: what the relay listens with, and who may read from it.
    """
    if address.startswith(file.SCHEME):
        return FileFetcher(address, epoch, events, limits=limits, give_up_s=give_up_s)
    if address.startswith(group.SCHEME):
        return NcclFetcher(
            address, epoch, events, device=device, deadline_s=deadline_s, limits=limits, give_up_s=give_up_s
        )
    addresses = address.split(",")
    for one in addresses:
        _require_stream(one)
    if relay:
        return Relay(
            addresses, relay, epoch, events, keys=keys, serve_keys=relay_keys, limits=limits, give_up_s=give_up_s
        )
    return StreamFetcher(addresses, epoch, events, keys=keys, limits=limits, give_up_s=give_up_s)


def relay_address(bind: str) -> str:
    """`bind` with a port that is free now, where it has port 0: a daemon names its relay before it opens it."""
    if not bind:
        return ""
    _require_stream(bind)
    host = urlsplit(bind).hostname or ""
    if host in ("0.0.0.0", "*", "::"):
        raise ConfigError(f"expected an address at which others reach this machine to relay weights on, got {bind}")
    if not bind.startswith("tcp://") or not bind.endswith(":0"):
        return bind
    try:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            return f"{bind.removesuffix(':0')}:{listener.getsockname()[1]}"
    except OSError as error:
        raise ConfigError(f"expected an address of this machine to relay weights on, got {bind}: {error}") from error


def _require_stream(address: str) -> None:
    if not address.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"expected a weights address with tcp://, ipc://, nccl:// or file://, got {address!r}")
