"""Weights on their way from the learner to the generators.

consumes  (name, tensor) pairs of one policy version, from `publish(version, named)` on the learner's rank 0
produces  verified `Snapshot`s of the newest version, from `poll()` in every generator

`protocol.py` has the two faces every transport shows; `stream.py` is the TCP one. What is served is compared with what
was published by the digest that `snapshot.py` defines. Nothing here imports torch before a tensor is touched.
"""
