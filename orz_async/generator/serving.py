"""Builds the engine that a Welcome asks for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from orz_async.broker.messages import Welcome
from orz_async.config import GeneratorConfig
from orz_async.data.tokenizer import Tokenizer, load_tokenizer
from orz_async.generator.engine import Engine
from orz_async.generator.ports import Serving


def preload(engine: str = "transformers") -> None:
    """Import what the engine needs, which takes seconds that are free while the learner starts."""
    if engine == "transformers":
        importlib.import_module("orz_async.generator.transformers_engine")
    else:
        importlib.import_module("transformers")  # vLLM itself wants its environment variables first


def make_serving(
    welcome: Welcome,
    settings: GeneratorConfig,
    *,
    model_path: str,
    dtype: str,
    device: str,
    prefill_tokens: int,
    options: Mapping[str, Any] | None = None,
) -> Serving:
    """Load model and tokenizer of a local directory; the weights are replaced by the learner's before they serve.

    `options` are engine arguments of vLLM beyond those that have a setting.
    """
    path = model_path or welcome.model_path
    tokenizer = load_tokenizer(path)
    if settings.engine == "vllm":
        engine: Engine = _vllm_engine(welcome, settings, tokenizer, path, dtype, prefill_tokens, options or {})
    else:
        engine = _embedded_engine(welcome, settings, tokenizer, path, dtype, device, prefill_tokens)
    return Serving(engine, lambda response: tokenizer.decode(response.tolist(), skip_special_tokens=True))


def _embedded_engine(
    welcome: Welcome,
    settings: GeneratorConfig,
    tokenizer: Tokenizer,
    path: str,
    dtype: str,
    device: str,
    prefill_tokens: int,
) -> Engine:
    # Imported here: `--help` and errors in the command line need no torch.
    import torch

    from orz_async.generator.model import load_model
    from orz_async.generator.stop import StopMatcher
    from orz_async.generator.transformers_engine import TransformersEngine

    torch.set_num_threads(settings.threads)
    model = load_model(path, dtype=dtype, device=device)
    return TransformersEngine(
        model,
        slots=settings.slots,
        max_model_tokens=welcome.max_model_tokens,
        stop=StopMatcher(welcome.stop, tokenizer.decode, int(model.config.get_text_config().vocab_size)),
        eos_tokens=eos_tokens(model.generation_config.eos_token_id, tokenizer.eos_token_id),
        keep_kv=settings.keep_kv,
        prefill_tokens=prefill_tokens,
    )


def _vllm_engine(
    welcome: Welcome,
    settings: GeneratorConfig,
    tokenizer: Tokenizer,
    path: str,
    dtype: str,
    prefill_tokens: int,
    options: Mapping[str, Any],
) -> Engine:
    from orz_async.generator.vllm_shim import make_engine_args, prepare_environment, require_vllm

    require_vllm()
    one_worker = settings.tensor_parallel == settings.data_parallel == 1
    prepare_environment(threads=settings.threads, kv_gb=settings.kv_gb, one_worker=one_worker)

    from orz_async.generator.model import load_shapes
    from orz_async.generator.stop import StopMatcher
    from orz_async.generator.vllm_engine import VllmEngine
    from orz_async.generator.vllm_loop import VllmLoop

    shapes = load_shapes(path)
    if dtype == "auto":
        dtype = str(shapes.dtype).removeprefix("torch.")
    vocab_size = int(shapes.config.get_text_config().vocab_size)
    args = make_engine_args(
        model=path,
        dtype=dtype,
        slots=settings.slots,
        max_model_tokens=welcome.max_model_tokens,
        prefill_tokens=prefill_tokens,
        tensor_parallel=settings.tensor_parallel,
        data_parallel=settings.data_parallel,
        options=options,
    )
    return VllmEngine(
        VllmLoop(args),
        model=shapes,
        dtype=dtype,
        slots=settings.slots,
        max_model_tokens=welcome.max_model_tokens,
        stop=StopMatcher(welcome.stop, tokenizer.decode, vocab_size),
        eos_tokens=eos_tokens(shapes.generation_config.eos_token_id, tokenizer.eos_token_id),
        vocab_size=vocab_size,
        keep_kv=settings.keep_kv,
    )


def eos_tokens(*declared: int | list[int] | None) -> set[int]:
    """Every token that the model's or the tokenizer's files call the end of a sequence."""
    tokens: set[int] = set()
    for one in declared:
        tokens.update([one] if isinstance(one, int) else one or ())
    return tokens
