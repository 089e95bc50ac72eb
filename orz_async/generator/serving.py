"""Builds the engine that a Welcome asks for."""

from __future__ import annotations

import importlib

from orz_async.broker.messages import Welcome
from orz_async.config import GeneratorConfig
from orz_async.data.tokenizer import load_tokenizer
from orz_async.errors import ConfigError
from orz_async.generator.ports import Serving


def preload() -> None:
    """Import what the engine needs, which takes seconds that are free while the learner starts."""
    importlib.import_module("orz_async.generator.transformers_engine")


def make_serving(
    welcome: Welcome, settings: GeneratorConfig, *, model_path: str, dtype: str, device: str, prefill_tokens: int
) -> Serving:
    """Load model and tokenizer of a local directory; the weights are replaced by the learner's before they serve."""
    if settings.engine != "transformers":
        raise ConfigError(f"expected --engine transformers, found {settings.engine}, which this version does not have")
    # Imported here: `--help` and errors in the command line need no torch.
    import torch

    from orz_async.generator.model import load_model
    from orz_async.generator.stop import StopMatcher
    from orz_async.generator.transformers_engine import TransformersEngine

    torch.set_num_threads(settings.threads)
    path = model_path or welcome.model_path
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype=dtype, device=device)
    engine = TransformersEngine(
        model,
        slots=settings.slots,
        max_model_tokens=welcome.max_model_tokens,
        stop=StopMatcher(welcome.stop, tokenizer.decode, int(model.config.get_text_config().vocab_size)),
        eos_tokens=eos_tokens(model.generation_config.eos_token_id, tokenizer.eos_token_id),
        keep_kv=settings.keep_kv,
        prefill_tokens=prefill_tokens,
    )
    return Serving(engine, lambda response: tokenizer.decode(response.tolist(), skip_special_tokens=True))


def eos_tokens(*declared: int | list[int] | None) -> set[int]:
    """Every token that the model's or the tokenizer's files call the end of a sequence."""
    tokens: set[int] = set()
    for one in declared:
        tokens.update([one] if isinstance(one, int) else one or ())
    return tokens
