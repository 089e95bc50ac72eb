"""Both engines behind one way to make them. vLLM takes a minute to start, so a module of tests shares one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from orz_async.generator.engine import Engine, Sample
from orz_async.generator.stop import StopMatcher
from orz_async.records import Kind, Lease, Sampling, as_int32, int32_bytes

VOCAB = 48
MAX_TOKENS = 160
SLOTS = 8
PATIENCE_S = 120.0


def model(change: int = 0) -> PreTrainedModel:
    """Version `change` of one model. Tied embeddings, as small models have; heads of 64, the least vLLM has on CPU."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    made: PreTrainedModel = Qwen2ForCausalLM(config).eval()
    for seed, scale in [(100, 0.1), (change, 0.05)][: 2 if change else 1]:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=noise))
    return made


def tensors(change: int = 0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model(change).named_parameters()}


def text(tokens: Sequence[int]) -> str:
    """A vocabulary of characters: 0 is "0", 17 is "A"; the last token is the text "</end>"."""
    return "".join("</end>" if token == VOCAB - 1 else chr(48 + token) for token in tokens)


class Make(Protocol):
    def __call__(
        self, *, stop: Sequence[str] = (), eos: Iterable[int] = (), slots: int = SLOTS, keep_kv: bool = False
    ) -> Engine:
        """An engine that serves version 0."""


def make_transformers(
    *, stop: Sequence[str] = (), eos: Iterable[int] = (), slots: int = SLOTS, keep_kv: bool = False
) -> Engine:
    from orz_async.generator.transformers_engine import TransformersEngine

    matcher = StopMatcher(stop, text, VOCAB)
    engine = TransformersEngine(
        model(), slots=slots, max_model_tokens=MAX_TOKENS, stop=matcher, eos_tokens=eos, keep_kv=keep_kv
    )
    engine.apply(0, tensors())
    return engine


def start_vllm(directory: Path) -> Any:
    """vLLM itself, serving the model's directory."""
    from orz_async.generator.vllm_loop import VllmLoop
    from orz_async.generator.vllm_shim import make_engine_args, prepare_environment

    model().save_pretrained(directory)
    prepare_environment(threads=1, kv_gb=1.0)
    return VllmLoop(
        make_engine_args(
            model=str(directory),
            dtype="float32",
            slots=SLOTS,
            max_model_tokens=MAX_TOKENS,
            prefill_tokens=512,
            tensor_parallel=1,
            data_parallel=1,
            options={},
        )
    )


def vllm_maker(vllm: Any) -> Make:
    from orz_async.generator.vllm_engine import VllmEngine

    def make(
        *, stop: Sequence[str] = (), eos: Iterable[int] = (), slots: int = SLOTS, keep_kv: bool = False
    ) -> VllmEngine:
        engine = VllmEngine(
            vllm,
            model=model(),
            dtype="float32",
            slots=slots,
            max_model_tokens=MAX_TOKENS,
            stop=StopMatcher(stop, text, VOCAB),
            eos_tokens=eos,
            vocab_size=VOCAB,
            keep_kv=keep_kv,
        )
        engine.apply(0, tensors())
        return engine

    return make


def lease(
    rollout: int,
    *,
    prompt: Sequence[int] | None = None,
    new: int = 20,
    temperature: float = 1.0,
    kind: Kind = "train",
    seed: int | None = None,
) -> Lease:
    """Its prompt, if none is given, and its seed follow from the rollout's number."""
    if prompt is None:
        prompt = np.random.default_rng(rollout).integers(0, VOCAB - 1, 3 + rollout % 12).tolist()
    seed = rollout * 7919 + 1 if seed is None else seed
    prompt_bytes = int32_bytes(np.asarray(prompt, np.int32))
    return Lease(kind, rollout, 0, f"p{rollout}", prompt_bytes, "", 0, seed, 0, Sampling(temperature, new))


def run(engine: Engine, leases: Iterable[Lease] = ()) -> dict[int, Sample]:
    """Submit and poll until the engine is idle; samples by rollout."""
    for one in leases:
        engine.submit(one)
    samples: dict[int, Sample] = {}
    until = time.monotonic() + PATIENCE_S
    while not engine.idle:
        assert time.monotonic() < until, engine.progress()
        samples.update({sample.lease.rollout: sample for sample in engine.poll()})
    return samples


def run_until(engine: Engine, tokens: int) -> dict[int, Sample]:
    """Poll until so many more tokens were sampled."""
    goal, until = engine.tokens_sampled + tokens, time.monotonic() + PATIENCE_S
    samples: dict[int, Sample] = {}
    while engine.tokens_sampled < goal:
        assert time.monotonic() < until and not engine.idle, engine.progress()
        samples.update({sample.lease.rollout: sample for sample in engine.poll()})
    return samples


@torch.no_grad()
def recomputed(change: int, sample: Sample) -> np.ndarray:
    """float64 log-probs of the response under a version, by one forward with transformers' own attention."""
    double = model(change).double()
    double.set_attn_implementation("eager")
    ids = torch.from_numpy(np.concatenate([as_int32(sample.lease.prompt), sample.response]).astype(np.int64))
    logits_TV = double(input_ids=ids[None], use_cache=False).logits[0] / sample.lease.sampling.temperature
    start = len(sample.lease.prompt) // 4
    logprobs_TV = torch.log_softmax(logits_TV[start - 1 : -1], dim=-1)
    return logprobs_TV.gather(1, ids[start:, None])[:, 0].numpy()


def span_errors(sample: Sample) -> list[float]:
    """Largest difference in each span between the recorded log-probs and those under the span's own version."""
    ends = [span.start for span in sample.spans[1:]] + [len(sample.response)]
    return [
        float(np.abs(recomputed(span.version, sample) - sample.logprobs)[span.start : end].max())
        for span, end in zip(sample.spans, ends, strict=True)
    ]
