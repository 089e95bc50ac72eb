"""The sizes of a model: from its config.json, or of a well-known one by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from orz_async.config_toml import nearest
from orz_async.errors import ConfigError, ModelError

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP (Llama, Qwen, Mistral and Gemma families)."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def layer_params(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def backbone_params(self) -> int:
        """Without embedding and head."""
        return self.layers * self.layer_params + self.hidden

    @property
    def params(self) -> int:
        return self.backbone_params + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def critic_params(self) -> int:
        """The head is one column."""
        return self.backbone_params + self.vocab * self.hidden + self.hidden

    def kv_bytes(self, element: int) -> int:
        """Of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element

    def forward_flops(self, context: float) -> float:
        """Of one token that sees `context` others: two operations a weight, and the attention's two products."""
        return 2.0 * (self.backbone_params + self.vocab * self.hidden) + 4.0 * self.layers * self.heads * (
            self.head_dim * context
        )


# From the config.json that Qwen publishes with each model.
KNOWN = {
    "0.5b": Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 64, 4864, 151936, True),
    "1.5b": Shape("Qwen2.5-1.5B", 1536, 28, 12, 2, 128, 8960, 151936, True),
    "7b": Shape("Qwen2.5-7B", 3584, 28, 28, 4, 128, 18944, 152064, False),
    "32b": Shape("Qwen2.5-32B", 5120, 64, 40, 8, 128, 27648, 152064, False),
}

LENGTHS = {"0.5b": 772, "1.5b": 783, "7b": 1461, "32b": 2662}
"""Mean response length half-way through Open-Reasoner-Zero's runs (arXiv 2503.24290, training curves, digitised)."""


def find_shape(name: str | None, model_path: str) -> Shape:
    """`name` of a known model, or what `model_path`/config.json says."""
    if name is not None:
        if shape := KNOWN.get(name.lower()):
            return shape
        raise ConfigError(f"expected --shape to be one of {', '.join(KNOWN)}, found {name!r}; {nearest(name, KNOWN)}")
    path = Path(model_path) / "config.json"
    try:
        data = path.read_bytes()[:MAX_CONFIG_BYTES]
    except OSError as error:
        raise ConfigError(
            f"expected the model's config.json at {path}, found: {error.strerror}; give --model.path DIR, or "
            f"--shape {'|'.join(KNOWN)} to plan for a model that is not here"
        ) from error
    try:
        return _from_config(path, msgspec.json.decode(data, type=dict[str, Any]))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"expected {path} to describe a decoder (hidden_size, num_hidden_layers, num_attention_heads, "
            f"intermediate_size, vocab_size), found: {error!r}"
        ) from error


def _from_config(path: Path, config: dict[str, Any]) -> Shape:
    config = config.get("text_config") or config
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return Shape(
        name=path.parent.name,
        hidden=hidden,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
