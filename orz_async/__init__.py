"""Asynchronous PPO for reasoning RL: decoupled generator and learner pools with bounded staleness.

The pipeline, and the folder that holds each stage::

    data/ ──prompts──► broker/ ──leases──► generator/ ──► reward/ ──trajectories──► broker/ ──batches──► learner/
                                               ▲                                                            │
                                               └─────────────────────── weights/ ◄──────────────────────────┘

Axes in tensor names: ``B`` sequences, ``T`` tokens of one response (padded), ``N`` tokens of a packed batch,
``V`` vocabulary, ``D`` model width. A name ending in ``_B1`` has one element more than there are sequences.

Words: a *rollout* is one sample of one prompt, the unit of lease, delivery and training. A *lease* is the right, with
a deadline, to produce one rollout. A *trajectory* is the result. *Version* v is the number of policy updates
published. *Lag* is the learner's version when it trains on a token minus the version that sampled the token.
"""

__version__ = "0.1.0"
