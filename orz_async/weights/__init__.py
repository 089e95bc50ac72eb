"""Weights on their way from the learner to the generators.

consumes  (name, tensor) pairs of one policy version, from `publish(version, named)` on the learner's rank 0
produces  verified `Snapshot`s of the newest version, from `poll()` in every generator

    protocol   the two faces every transport shows             transport   which one an address means
    stream     TCP: publisher, fetcher, relay                   file        a shared folder
    nccl_publisher, nccl_fetcher, group   process groups        digests     what the learner said of each version
    snapshot   copies, checksums, the digest of a version       delta, history, shelf   what changed since which version
    wire, manifest, payload, assembly, download                the stream's parts without sockets

Nothing here imports torch before a tensor is touched.
"""
