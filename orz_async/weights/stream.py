"""Weights over TCP: full snapshots and deltas, chunk by chunk, at the pace of each receiver.

::

    learner's thread            publisher's thread                    fetcher's thread           generator's loop
    publish(v) ──copy──►  State ─► Shelf ─► Payload ◄──Want, Pull──  Download ─► Assembly ──►  poll() -> Snapshot
                                              └──Manifest, Chunk──►     (credits)

Bounds. The publisher holds the newest version, the one before it until the difference of the two is coded, at most one
older one that is being read, one waiting its turn and one being copied; the way back to earlier versions takes at most
half a version; for each fetcher at most SEND_QUEUE chunks are queued. A fetcher holds the version it last completed
and the one in the making, and asks for CREDITS chunks ahead. Every wait is bounded by a tick, and silence by
reconnection with backoff.

Trust. A fetcher allocates nothing before `manifest.check`; frames carry a checksum, tensors theirs, and the whole the
digest of `snapshot.py`. What `poll` returns has passed all three.
"""

from orz_async.weights.fetcher import StreamFetcher
from orz_async.weights.publisher import StreamPublisher
from orz_async.weights.relay import Relay

__all__ = ["Relay", "StreamFetcher", "StreamPublisher"]
