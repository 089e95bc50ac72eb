"""Sampling speed of the embedded engine on the demo's model shape, against what transformers brings along.

All sample the same work: 128 rollouts of the demo's shape (prompts of 15 tokens, four samples of each; responses of 10
to 96 tokens, 31 on average, fixed in advance by limits), at temperature 1 with log-probs, on one core, with at most
so many at once as the variant says. Prompt tokens count as work done, not as tokens sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.protocol import Row, row
from orz_async.generator.stop import StopMatcher
from orz_async.generator.transformers_engine import TransformersEngine
from orz_async.records import Lease, Sampling, int32_bytes

ROLLOUTS, PROMPT, LONGEST, VOCAB = 128, 15, 96, 50
REPEATS = 3


def demo_shape() -> Any:
    """Random weights: lengths come from limits, so what is sampled does not matter."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


def workload() -> tuple[list[list[int]], list[int]]:
    """Prompts, and the number of tokens each response gets."""
    random = np.random.default_rng(0)
    prompts = [random.integers(1, VOCAB, PROMPT).tolist() for _ in range(ROLLOUTS // 4) for _ in range(4)]
    prompts = [prompts[4 * (n // 4)] for n in range(ROLLOUTS)]
    limits = np.minimum(10 + random.geometric(1 / 22, ROLLOUTS), LONGEST)
    return prompts, limits.tolist()


def embedded(concurrent: int) -> Callable[[], int]:
    """The engine of this package."""
    prompts, limits = workload()
    model = demo_shape()
    stop = StopMatcher(("</answer>",), lambda tokens: "".join(chr(60 + token) for token in tokens), VOCAB)
    engine = TransformersEngine(model, slots=concurrent, max_model_tokens=PROMPT + LONGEST, stop=stop, eos_tokens=())
    engine.apply(0, dict(model.named_parameters()))

    def sample() -> int:
        for n, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            engine.submit(Lease("train", n, 0, "", int32_bytes(prompt), "", 0, n, 0, Sampling(1.0, limit)))
        tokens = 0
        while not engine.idle:
            tokens += sum(len(done.response) for done in engine.poll())
        return tokens

    return sample


def plain_loop(concurrent: int) -> Callable[[], int]:
    """A loop over the model with its own cache: fixed batches, finished rows dropped, no row takes their place."""
    prompts, limits = workload()
    model = demo_shape()

    @torch.inference_mode()
    def sample() -> int:
        tokens = 0
        for start in range(0, ROLLOUTS, concurrent):
            left = torch.tensor(limits[start : start + concurrent])
            tokens += int(left.sum())
            ids = torch.tensor(prompts[start : start + concurrent])
            cache = DynamicCache(config=model.config)
            while len(left):
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                logprobs = torch.log_softmax(logits, dim=-1)
                ids = torch.multinomial(logprobs.exp(), 1)
                logprobs.gather(1, ids)
                left = left - 1
                rows = torch.nonzero(left > 0)[:, 0]
                if len(rows) < len(left):
                    cache.batch_select_indices(rows)
                    ids, left = ids[rows], left[rows]
        return tokens

    return sample


class _Limits(StoppingCriteria):
    def __init__(self, limits: list[int]) -> None:
        self._limits = torch.tensor(limits)

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return input_ids.shape[1] - PROMPT >= self._limits


def library_generate(concurrent: int) -> Callable[[], int]:
    """`generate`: fixed batches, each until its longest row ends."""
    prompts, limits = workload()
    model = demo_shape()

    def sample() -> int:
        for start in range(0, ROLLOUTS, concurrent):
            batch = torch.tensor(prompts[start : start + concurrent])
            model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                top_k=0,
                max_new_tokens=LONGEST,
                stopping_criteria=StoppingCriteriaList([_Limits(limits[start : start + concurrent])]),
                output_logits=True,
                return_dict_in_generate=True,
            )
        return sum(limits)

    return sample


def library_continuous(concurrent: int) -> Callable[[], int]:
    """transformers' continuous batching."""
    prompts, limits = workload()
    model = demo_shape()
    settings = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=8 * ROLLOUTS,
        max_batch_tokens=2048,
        max_requests_per_batch=concurrent,
        return_logprobs=True,
    )
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, top_k=0, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0
    )

    def sample() -> int:
        tokens = 0
        with model.continuous_batching_context_manager(generation, continuous_batching_config=settings) as manager:
            for prompt, limit in zip(prompts, limits, strict=True):
                manager.add_request(prompt, max_new_tokens=limit)
            for _ in range(ROLLOUTS):
                done = manager.get_result(timeout=60)
                tokens += len(done.generated_tokens) if done is not None else 0
        return tokens

    return sample


def run() -> list[Row]:
    """Tokens per second of each variant, measured in turns."""
    torch.set_num_threads(1)
    variants = {
        "embedded, 128 at once": embedded(128),
        "embedded, 32 at once": embedded(32),
        "embedded, 8 at once": embedded(8),
        "plain KV-cache loop, 128": plain_loop(128),
        "transformers generate, 128": library_generate(128),
        "transformers continuous, 128": library_continuous(128),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(REPEATS + 1):
        for name, sample in variants.items():
            started = time.perf_counter()
            tokens = sample()
            if turn:  # the first is a warm-up
                rates[name].append(tokens / (time.perf_counter() - started))
    first = next(iter(rates.values()))
    return [
        row("sampling, demo shape, one core", name, "tok/s", values)
        | {"ratio_to_first": median(value / one for value, one in zip(values, first, strict=True))}
        for name, values in rates.items()
    ]
