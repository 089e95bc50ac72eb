"""A Llama-like network as tensors: what a decoder computes. Qwen2, Qwen3, Llama and Mistral are such."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """x W^T + bias."""

    weight: Tensor
    """[outputs, inputs]"""
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    attention_norm_D: Tensor
    qkv: Linear
    """To the query heads, then the key heads, then the value heads."""
    query_norm: Tensor | None
    """[head_dim]: RMS norm of each query head before it is turned; None: there is none. So for the keys."""
    key_norm: Tensor | None
    out: Linear
    mlp_norm_D: Tensor
    gate_up: Linear
    """To the gate, then to what it multiplies."""
    down: Linear
    window: int | None
    """Keys a query sees, itself included; None: all before it."""


@dataclass(frozen=True, slots=True)
class Network:
    """float32, in host memory."""

    embedding_VD: Tensor
    layers: tuple[Layer, ...]
    norm_D: Tensor
    head: Linear
    cos: Tensor
    """[positions, head_dim]: rotary table, each half the same angles."""
    sin: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    """Added to the mean square under the root of every RMS norm."""
    scale: float
    """Of products of queries and keys."""

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return self.layers[0].down.weight.shape[1]
