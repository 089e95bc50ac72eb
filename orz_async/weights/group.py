"""Two processes that exchange tensors: a rendezvous store, a group, and a deadline on every operation.

Each generator has a group of its own with the learner, so that nothing a generator does can hold up another one. The
backend is NCCL between GPUs and gloo between CPUs; everything above `Group` is the same code for both. The store is
torch's TCPStore: bytes by key, nothing pickled, not authenticated, not encrypted.

Keys, for member number i, which a generator draws when it joins:

    epoch, backend          of the learner
    members, calls          counters: how many have joined; how often any of them wanted something
    member/i/want           version it wants                   member/i/go/n    transfer n begins: bytes of its manifest
    member/i/ack/n          digest it now holds, or why not    member/i/out     why it was expelled
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from orz_async.errors import ConfigError, PeerLostError, PortError

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

SCHEME = "nccl://"
STORE_S = 20.0
"""Longest a single question to the store may take."""
POLL_S = 0.02
_WATCHDOG_S = 3600.0
"""NCCL's own watchdog ends the whole process; our deadline, which aborts one group, has to come first."""


class GroupError(PeerLostError):
    """The other side died, froze, or does not take part."""


def host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    if not address.startswith(SCHEME) or not parts.hostname or parts.port is None:
        raise ConfigError(f"expected nccl://HOST:PORT, got {address!r}")
    return parts.hostname, parts.port


def listen(address: str, epoch: int, backend: str) -> tuple[Store, str]:
    """The store that generators find each other by, listening on this address only, and the address with its port."""
    from torch._C._distributed_c10d import TCPStore

    host, port = host_and_port(address)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise PortError(f"cannot offer weights on {address}: {error.strerror}; choose another port or 0") from error
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_S),
        master_listen_fd=listener.detach(),
    )
    store.set("epoch", str(epoch))
    store.set("backend", backend)
    return store, f"{SCHEME}[{host}]:{port}" if ":" in host else f"{SCHEME}{host}:{port}"


def join(address: str) -> Store:
    """A connection of one's own: questions on a shared one wait for each other. GroupError if nobody answers."""
    from torch._C._distributed_c10d import TCPStore

    host, port = host_and_port(address)
    try:
        # torch's own attempts to connect are long and loud; this says at once that nobody listens.
        socket.create_connection((host, port), timeout=STORE_S).close()
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_S))
    except (OSError, RuntimeError) as error:
        raise GroupError(f"expected a learner at {address}, found: {error}") from error


def peek(store: Store, key: str) -> str | None:
    """The value of a key, None while it is not there."""
    return store.get(key).decode() if store.check([key]) else None


class Group:
    """The learner (rank 0) and one generator (rank 1).

    Raises GroupError from every method when the other side is gone or misses the deadline; the group is then unusable.
    """

    def __init__(
        self, store: Store, member: int, rank: int, address: str, *, backend: str, device: str, deadline_s: float
    ) -> None:
        self._deadline_s = deadline_s
        self.device = device
        try:
            self._group: Any = _BACKENDS[backend](store, f"member/{member}/group", rank, address, deadline_s)
        except RuntimeError as error:
            raise GroupError(f"member {member} did not come to its group: {_first_line(error)}") from error

    def broadcast(self, tensor: Tensor, closing: Callable[[], bool]) -> None:
        """Rank 0's bytes reach rank 1 in place. `closing` is asked while waiting, and ends the wait."""
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self._deadline_s)
        end, pause = time.monotonic() + self._deadline_s, 1e-4
        try:
            work = self._group.broadcast([tensor], options)
            while not work.is_completed():
                if closing() or time.monotonic() > end:
                    break
                time.sleep(pause)
                pause = min(2 * pause, 5e-3)
            else:
                work.wait()
                return
        except RuntimeError as error:  # torch.distributed raises nothing narrower when a peer is gone
            raise GroupError(_first_line(error)) from error
        what = "the end of this side" if closing() else f"no progress within {self._deadline_s:g} s"
        raise GroupError(f"{tensor.numel()} bytes did not pass: {what}")

    def close(self) -> None:
        """Cut the connection whatever is under way; the other side notices."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _gloo(store: Store, prefix: str, rank: int, address: str, deadline_s: float) -> Any:
    """The interface is the one that reaches the learner, not whatever the host's name resolves to."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_host(address, rank))]
    options._timeout = timedelta(seconds=deadline_s)
    return dist.ProcessGroupGloo(PrefixStore(prefix, store), rank, 2, options)


def _nccl(store: Store, prefix: str, rank: int, address: str, deadline_s: float) -> Any:
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=max(_WATCHDOG_S, 2 * deadline_s))
    return dist.ProcessGroupNCCL(PrefixStore(prefix, store), rank, 2, options)


_BACKENDS: dict[str, Callable[[Any, str, int, str, float], Any]] = {"gloo": _gloo, "nccl": _nccl}


def _own_host(address: str, rank: int) -> str:
    host, port = host_and_port(address)
    if rank == 0:
        return host
    with socket.create_connection((host, port), timeout=STORE_S) as probe:
        return str(probe.getsockname()[0])


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


def self_name() -> str:
    """How a generator is called in the learner's events."""
    return f"{socket.gethostname()}:{os.getpid()}"
