"""Small Llama-like models on CPU in one call a forward, instead of some hundred small operations of torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from orz_async import ops
from orz_async.generator.batch import Work
from orz_async.generator.kv_cache import KVCache

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on the length of a sequence."""

_PARTS = (nn.Linear, nn.Embedding, nn.ModuleList, type(ACT2FN["silu"]))

MOST_PARAMETERS = 40_000_000
"""Measured on one core with AVX-512, with 1, 8, 32 and 128 rows: at 4.5 million parameters the model's own code takes
3.0, 1.9, 1.5 and 1.1 times as long, at 35 million 3.2, 2.1, 1.5 and 0.95 times, at 118 million 3.2, 2.2, 1.4 and 0.9.
Where most of a step is large matrix products little is left to gain, and the second copy of the weights takes a quarter
of a second to make at each version."""


class FusedModel:
    """The forward of `model` with a packed copy of its weights, over a slot cache."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        network = _network(model, cache.max_tokens)
        self._decoder = ops.Decoder(network)
        self._cache = cache
        self._layers = range(len(network.layers))
        self._heads = torch.empty(1, network.kv_heads, 0, network.head_dim)

    def forward(self, work: Work) -> Tensor:
        """As `SlotModel.forward`."""
        rows, prefixes = len(work.decode_tokens), len(work.prefixes)
        source = np.asarray(work.source, np.int64)
        # A prefix is computed in the first of its slots and copied to the others.
        first = [work.slots[at] for at in np.unique(source, return_index=True)[1].tolist()]
        lengths = [len(prefix) for prefix in work.prefixes]
        caches = [self._cache.layer(layer, self._heads, self._heads) for layer in self._layers]
        made = self._decoder.step(
            np.concatenate((work.decode_tokens, *work.prefixes)).astype(np.int64, copy=False),
            np.concatenate((np.arange(rows), rows + np.cumsum([0, *lengths]))),
            np.concatenate((np.arange(rows), np.asarray(first, np.int64))),
            np.concatenate((work.decode_positions, np.zeros(prefixes, np.int64))),
            caches,
        )
        for slot, prefix in zip(work.slots, source.tolist(), strict=True):
            if slot != first[prefix]:
                self._cache.move(first[prefix], slot, lengths[prefix])
        if np.array_equal(source, np.arange(prefixes)):
            return made
        return made[torch.from_numpy(np.concatenate((np.arange(rows), rows + source)))]


def fits(model: PreTrainedModel) -> bool:
    """Whether `FusedModel` computes what this model does, and is faster."""
    config, home = model.config, type(model).__module__
    if config.model_type not in _FAMILIES or home.split(".")[:3] != ["transformers", "models", config.model_type]:
        return False
    tensors = [*model.parameters()]
    return (
        all(_is_known(module, home) and not _is_hooked(module) for module in model.modules())
        and all(one.dtype == torch.float32 and one.device.type == "cpu" for one in tensors)
        and sum(one.numel() for one in tensors) <= MOST_PARAMETERS
        and config.hidden_act == "silu"
        and model.model.rotary_emb.rope_type in _STATIC_ROPE
        and getattr(config, "partial_rotary_factor", 1.0) == 1.0
    )


def _is_known(module: nn.Module, home: str) -> bool:
    """Whether it is of the family's own code or a plain part, and not something that was put in the place of one."""
    return type(module).__module__ == home or type(module) in _PARTS


def _is_hooked(module: nn.Module) -> bool:
    """Somebody watches or changes what goes through it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _network(model: PreTrainedModel, positions: int) -> ops.Network:
    base: Any = model.model
    attention = base.layers[0].self_attn
    with torch.inference_mode():
        cos, sin = base.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
    return ops.Network(
        embedding_VD=base.embed_tokens.weight,
        layers=tuple(_layer(layer, model.config) for layer in base.layers),
        norm_D=base.norm.weight,
        head=_linear(model.lm_head),
        cos=cos[0],
        sin=sin[0],
        heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        eps=base.norm.variance_epsilon,
        scale=attention.scaling,
    )


def _linear(*modules: Any) -> ops.Linear:
    """One linear map to what each of these computes."""
    biases = [module.bias for module in modules]
    return ops.Linear(
        torch.cat([module.weight for module in modules]),
        None if biases[0] is None else torch.cat(biases),
    )


def _layer(layer: Any, config: Any) -> ops.Layer:
    attention, mlp = layer.self_attn, layer.mlp
    normalised = hasattr(attention, "q_norm")
    # Mistral has one window for all layers; the others say of each layer whether it has one.
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return ops.Layer(
        attention_norm_D=layer.input_layernorm.weight,
        qkv=_linear(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=attention.q_norm.weight if normalised else None,
        key_norm=attention.k_norm.weight if normalised else None,
        out=_linear(attention.o_proj),
        mlp_norm_D=layer.post_attention_layernorm.weight,
        gate_up=_linear(mlp.gate_proj, mlp.up_proj),
        down=_linear(mlp.down_proj),
        window=window,
    )
