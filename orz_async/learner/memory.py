"""Memory of one GPU by part, by arithmetic: what `--dry-run` prints and a plan is made of. Imports no torch.

P parameters sharded over n ranks: float32 master weights 4P/n, gradients 4P/n, two Adam moments 8P/n; the same for the
critic. While a layer computes it is gathered, and the next one with it; the root (embedding and
head) stays gathered. Activations are what autograd keeps of the largest microbatch, counted for the module code of
transformers (norms and rotary embeddings in float32 keep copies); tests/unit/test_memory.py measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orz_async.config import Config

GiB = 1 << 30
_HEAD_CHUNK = 2**24
"""Elements of one chunk of logits, as in `ops`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A decoder of the common families."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    """RMSNorms of a layer, beside those of query and key."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """From config.json of a Hugging Face directory."""
        family = str(config.get("model_type", ""))
        heads = int(config["num_attention_heads"])
        bias = family == "qwen2" or bool(config.get("attention_bias"))
        return cls(
            vocab=int(config["vocab_size"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            tied=bool(config.get("tie_word_embeddings", family.startswith("gemma"))),
            qkv_bias=bias,
            qk_norm=family in ("qwen3", "gemma3_text"),
            norms=4 if family in ("gemma2", "gemma3_text") else 2,
        )

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * q + 2 * kv) + (q + 2 * kv if self.qkv_bias else 0)
        norms = self.norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def backbone(self) -> int:
        return self.embedding + self.layers * self.layer + self.hidden

    @property
    def policy(self) -> int:
        return self.backbone + (0 if self.tied else self.embedding)

    @property
    def critic(self) -> int:
        return self.backbone + self.hidden + 1


QWEN25: dict[str, Shape] = {
    name: Shape(
        vocab=vocab,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=tied,
        qkv_bias=True,
    )
    for name, vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, tied in (
        ("Qwen2.5-0.5B", 151936, 896, 4864, 24, 14, 2, 64, True),
        ("Qwen2.5-1.5B", 151936, 1536, 8960, 28, 12, 2, 128, True),
        ("Qwen2.5-7B", 152064, 3584, 18944, 28, 28, 4, 128, False),
        ("Qwen2.5-32B", 152064, 5120, 27648, 64, 40, 8, 128, False),
    )
}
"""By the last part of their name on the hub, so that a recipe can be planned before its model is there."""


def activation_bytes(shape: Shape, tokens: int, *, width: int, recompute: bool) -> int:
    """What autograd keeps of one forward pass over `tokens` tokens; `width` bytes an element of the compute type.

    Of a layer: each norm keeps its input in float32 and its output; the linear layers share their inputs; query and key
    before and after rotation, value, what attention gives; gate, its activation, up, their product.
    """
    d, i = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    floats = shape.norms * (2 * d + 1)
    if shape.qk_norm:
        floats += 2 * (q + kv) + shape.heads + shape.kv_heads
    kept = shape.norms * d + 3 * q + 3 * kv + 4 * i
    layer = tokens * (4 * floats + width * kept)
    if recompute:
        return (shape.layers + 1) * tokens * d * width + layer
    return shape.layers * layer


def head_bytes(shape: Shape, response_tokens: int, *, width: int) -> int:
    """One chunk of logits, hidden rows and their gradient, and in float32 the weight's gradient (and a copy of it)."""
    rows = min(response_tokens, max(1, _HEAD_CHUNK // shape.vocab))
    wide_copy = 0 if width == 4 else 4 * shape.embedding
    return 4 * rows * shape.vocab + 2 * width * response_tokens * shape.hidden + 4 * shape.embedding + wide_copy


def learner_phases(config: Config, shape: Shape, *, ranks: int) -> dict[str, dict[str, int]]:
    """Bytes by part on each GPU of the learner, in each phase of a step that can be its peak.

    What is offloaded is on the device all the same while it is used: the critic while it trains, the moments of policy
    or critic in its optimizer's step. Only there, but there is nothing of the activations left.
    """
    learner = config.learner
    shards = learner.shard_ranks or ranks
    width = 2 if config.model.dtype == "bfloat16" else 4
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    tokens = max(learner.max_tokens, longest)
    sizes = {"policy": shape.policy} | ({"critic": shape.critic} if learner.estimator == "gae" else {})
    kept = activation_bytes(shape, tokens, width=width, recompute=learner.activation_checkpointing)
    gathered: dict[str, int] = {}
    if ranks > 1 or width == 2:
        root = shape.policy - shape.layers * shape.layer
        gathered["gathered layers"] = width * (root + 2 * shape.layer) + width * shape.layer
    phases: dict[str, dict[str, int]] = {}
    for owner, size in sizes.items():
        resident: dict[str, int] = {}
        for name, other in sizes.items():
            away = name == "critic" and name != owner and learner.offload_critic
            resident[f"{name} weights"] = 0 if away else 4 * other // shards
            resident[f"{name} optimizer"] = 0 if learner.offload_optimizer else 8 * other // shards
        resident[f"{owner} gradients"] = 4 * size // shards
        head = {"head scratch": head_bytes(shape, tokens, width=width)} if owner == "policy" else {}
        phases[f"{owner}'s backward pass"] = resident | {"activations": kept} | head | gathered
        phases[f"{owner}'s optimizer step"] = resident | {f"{owner} optimizer": 8 * size // shards}
    return phases


def learner_peak(config: Config, shape: Shape, *, ranks: int) -> tuple[str, dict[str, int]]:
    """The phase that needs most, and its bytes by part."""
    phases = learner_phases(config, shape, ranks=ranks)
    return max(phases.items(), key=lambda phase: sum(phase[1].values()))


def generator_memory(config: Config, shape: Shape, *, width: int = 2) -> dict[str, int]:
    """Bytes by part of one generator daemon: weights, and keys and values of all slots at their longest."""
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    return {"weights": width * shape.policy, "KV cache": config.generator.slots * longest * token}


def lines(title: str, parts: Mapping[str, int]) -> list[str]:
    """A small table, in GiB."""
    total = sum(parts.values())
    rows = [f"  {name:<18} {size / GiB:>9.3f} GiB" for name, size in parts.items()]
    return [f"{title}: {total / GiB:.2f} GiB", *rows]
