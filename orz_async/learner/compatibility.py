"""May this configuration continue that checkpoint? Settings that decide what is learned may not change on the way."""

from __future__ import annotations

from typing import Any

from orz_async.config import Config
from orz_async.errors import CheckpointError
from orz_async.learner.checkpoint import Found, plain

_FREE = (
    *("run_dir", "steps", "generator", "weights", "guard", "eval", "checkpoint", "journal", "observe"),
    *("model.path", "broker.bind", "broker.lease_s", "broker.heartbeat_s", "broker.max_attempts"),
    *("broker.wait_generators_s", "learner.threads", "learner.audit_rollouts", "learner.publish_early"),
    *("learner.mismatch_warn", "learner.mismatch_stop", "learner.max_tokens"),
    *("learner.shard_ranks", "learner.activation_checkpointing", "learner.offload_optimizer"),
    *("learner.offload_critic", "learner.compile"),
)
"""Settings and whole sections that change speed, place or what is reported. `max_tokens` changes rounding only, unless
losses are averaged by pack; `steps` only the end, unless learning rates fall towards it."""


def changes(found: Found, config: Config) -> list[str]:
    """Sentences for the harmless differences; CheckpointError for the others."""
    # A setting that is younger than the checkpoint had its default, whatever it was called then.
    before, now = _flat(plain(Config())) | _flat(found.manifest.config), _flat(plain(config))
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    learner = config.learner
    bound = {"learner.max_tokens"} if learner.loss_aggregation == "pack" else set()
    bound |= {"steps"} if learner.lr_final != 1.0 else set()
    free = [name for name in _FREE if name not in bound]
    fixed = [name for name in differing if not any(name == f or name.startswith(f"{f}.") for f in free)]
    if fixed:
        told = "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in fixed)
        raise CheckpointError(
            f"{found.path}: expected the settings this run began with, found changes to what is learned: {told}. "
            "Set them back to resume, or choose another run_dir (model.path may be this run's export)"
        )
    return [f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in differing]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
