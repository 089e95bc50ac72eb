"""Tiny random models, leases and a plain forward to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from orz_async.generator.engine import Sample
from orz_async.generator.stop import StopMatcher
from orz_async.generator.transformers_engine import TransformersEngine
from orz_async.records import Kind, Lease, Sampling, as_int32, int32_bytes

VOCAB = 48
MAX_TOKENS = 80

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_model(architecture: str = "qwen2", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Random weights, large enough that every token and every key matters."""
    shape = _SHAPE | changes
    torch.manual_seed(seed)
    model: PreTrainedModel
    match architecture:
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**{"tie_word_embeddings": True} | shape))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape))
        case "mistral":  # a window shorter than the prompts
            model = MistralForCausalLM(MistralConfig(**shape, sliding_window=6))
        case "gemma2":  # soft caps, windows in every other layer, another scale, normalisation by 1 + weight
            model = Gemma2ForCausalLM(Gemma2Config(**shape, sliding_window=6, attn_logit_softcapping=5.0))
        case _:
            raise ValueError(architecture)
    return perturbed(model.eval(), seed, 0.15)


def perturbed(model: PreTrainedModel, seed: int, scale: float) -> PreTrainedModel:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def text(tokens: Sequence[int]) -> str:
    """A vocabulary of characters: 0 is "0", 17 is "A"."""
    return "".join(chr(48 + token) for token in tokens)


def make_engine(
    model: PreTrainedModel | None = None,
    *,
    slots: int = 8,
    stop: Sequence[str] = (),
    eos: Iterable[int] = (),
    version: int = 0,
    **options: Any,
) -> TransformersEngine:
    """An engine that serves the given model's weights as `version`."""
    model = tiny_model() if model is None else model
    matcher = StopMatcher(stop, text, VOCAB)
    options = {"max_model_tokens": MAX_TOKENS} | options
    engine = TransformersEngine(model, slots=slots, stop=matcher, eos_tokens=eos, **options)
    engine.apply(version, tensors_of(model))
    return engine


def lease(
    rollout: int,
    *,
    prompt: Sequence[int] | None = None,
    new: int = 20,
    temperature: float = 1.0,
    kind: Kind = "train",
    floor: int = 0,
) -> Lease:
    """Its prompt, if none is given, and its seed follow from the rollout's number."""
    if prompt is None:
        random = np.random.default_rng(rollout)
        prompt = random.integers(0, VOCAB, 3 + rollout % 12).tolist()
    return Lease(
        kind=kind,
        rollout=rollout,
        attempt=0,
        prompt_id=f"p{rollout}",
        prompt=int32_bytes(prompt),
        answer="",
        sample=0,
        seed=rollout * 7919 + 1,
        version_floor=floor,
        sampling=Sampling(temperature, new),
    )


def finish(engine: TransformersEngine, leases: Iterable[Lease] = ()) -> dict[int, Sample]:
    """Submit and run to the end; samples by rollout."""
    for one in leases:
        engine.submit(one)
    samples: dict[int, Sample] = {}
    while not engine.idle:
        samples.update({sample.lease.rollout: sample for sample in engine.poll()})
    return samples


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, sample: Sample) -> np.ndarray:
    """float64 log-probs of the response by one forward over the whole sequence with transformers' own attention."""
    tokens = torch.from_numpy(np.concatenate([as_int32(sample.lease.prompt), sample.response]).astype(np.int64))
    double = type(model)(model.config).double().eval()
    double.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    double.set_attn_implementation("eager")
    logits_TV = double(input_ids=tokens[None], use_cache=False).logits[0] / sample.lease.sampling.temperature
    start = len(sample.lease.prompt) // 4
    chosen = tokens[start:, None]
    return torch.log_softmax(logits_TV[start - 1 : -1], dim=-1).gather(1, chosen)[:, 0].numpy()
