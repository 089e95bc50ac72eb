"""Bytes on each GPU, counted from the model's shape. An estimate: allocators and libraries take some more."""

from __future__ import annotations

from dataclasses import dataclass

from orz_async.config import Config
from orz_async.sim.shape import Shape

HEAD_CHUNK_ELEMENTS = 2**24
"""Logits of one chunk of the fused head (`ops/reference/head.py`), float32, and as many for their gradient."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB by purpose, of one GPU."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def learner_memory(shape: Shape, config: Config, gpus: int) -> Memory:
    """Of one of `gpus` learner ranks at its peak. Master weights, gradients and Adam's two moments are float32 and
    sharded; policy and critic have their gradients one after the other.

    Offloaded moments are on the device during the optimizer's step, when the activations are gone: the larger of the
    two phases is the peak.
    """
    learner = config.learner
    element = 2 if config.model.dtype == "bfloat16" else 4
    shards = learner.shard_ranks or gpus
    params = shape.params + shape.critic_params
    tokens = max(learner.max_tokens, config.data.max_prompt_tokens + config.sampling.max_new_tokens)
    # What a layer keeps for its backward pass: two norms in and out, residuals, attention in and out; q, k, v; the
    # gated MLP's three products. When layers are computed again, only one has all of it, the others their inputs.
    kept = 6 * shape.hidden + (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 4 * shape.intermediate
    layers = shape.layers * shape.hidden + kept if learner.activation_checkpointing else shape.layers * kept
    gathered = 2 * shape.layer_params * element if gpus > 1 else 0
    held = {"weights": 4 * params / shards / GIB, "gradients": 4 * shape.params / shards / GIB}
    backward = Memory(
        held
        | {
            "optimizer": 0.0 if learner.offload_optimizer else 8 * params / shards / GIB,
            "activations": (tokens * layers * element + gathered) / GIB,
            "head": 2 * 4 * min(HEAD_CHUNK_ELEMENTS, tokens * shape.vocab) / GIB,
        }
    )
    step = Memory(held | {"optimizer": 8 * shape.params / shards / GIB, "activations": 0.0, "head": 0.0})
    return max(backward, step, key=lambda memory: memory.total)


def generator_memory(shape: Shape, config: Config, gpus: int, context: float) -> Memory:
    """Of one of the `gpus` that one engine is spread over; the KV of its slots at `context` tokens each."""
    element = 2 if config.model.dtype == "bfloat16" else 4
    return Memory(
        {
            "weights": shape.params * element / gpus / GIB,
            "swap": shape.params * element / gpus / GIB,
            "kv": config.generator.slots * context * shape.kv_bytes(element) / gpus / GIB,
        }
    )
