"""What of vLLM may be set from outside, and what may not because the learner could no longer trust a token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from orz_async.config_toml import nearest
from orz_async.errors import ConfigError

BIASED = {
    "top_p": "it cuts the tail of the distribution, and the log-probs are no longer those of the policy",
    "top_k": "it cuts the tail of the distribution, and the log-probs are no longer those of the policy",
    "min_p": "it cuts the tail of the distribution, and the log-probs are no longer those of the policy",
    "repetition_penalty": "it makes the distribution depend on more than the policy",
    "presence_penalty": "it makes the distribution depend on more than the policy",
    "frequency_penalty": "it makes the distribution depend on more than the policy",
    "logit_bias": "it samples from another distribution than the policy",
    "bad_words": "it samples from another distribution than the policy",
    "allowed_token_ids": "it samples from another distribution than the policy",
    "min_tokens": "it forbids the end of sequence, which the policy does not",
    "structured_outputs": "it forbids tokens that the policy allows",
    "logits_processors": "it samples from another distribution than the policy",
    "generation_config": "a model's own sampling defaults (top_p, top_k, penalties) would apply",
    "override_generation_config": "sampling defaults other than the policy's own would apply",
    "logprobs_mode": "PPO needs the log-probs after the temperature, which is processed_logprobs",
    "quantization": "the engine would serve other weights than the learner publishes",
    "kv_cache_dtype": "keys and values would be rounded, and the log-probs with them",
    "speculative_config": "the version and the log-prob of a draft token are not those of the policy",
}
"""Names that users of inference engines know, and why training refuses each."""

OURS = {
    "model": "--model",
    "dtype": "--dtype",
    "max_num_seqs": "--slots",
    "max_model_len": "sampling.max_new_tokens and data.max_prompt_tokens",
    "tensor_parallel_size": "--tensor-parallel",
    "data_parallel_size": "--data-parallel",
    "max_num_batched_tokens": "--prefill-tokens",
    "skip_tokenizer_init": "nothing: text is the daemon's business",
    "tokenizer": "nothing: text is the daemon's business",
    "weight_transfer_config": "nothing: weights come from the learner",
    "load_format": "nothing: weights come from the learner",
    "trust_remote_code": "nothing: code of a model directory is never run",
    "worker_extension_cls": "nothing: no code but this package's runs in the workers",
    "worker_cls": "nothing: no code but this package's runs in the workers",
}
"""Engine arguments that are set by something else: by what."""


def parse_options(words: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is some and as text where not, to engine arguments."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name:
            raise ConfigError(f"expected --vllm NAME=VALUE, found {word!r}; for example --vllm block_size=16")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    refuse(options)
    return options


def refuse(options: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """ConfigError for options that would bias training, that are set elsewhere, or, given names, that do not exist."""
    names = sorted(known)
    for name in options:
        if name in BIASED:
            raise ConfigError(f"expected sampling from the policy itself, found {name}: {BIASED[name]}; leave it out")
        if name in OURS:
            raise ConfigError(f"expected vLLM options that nothing else sets, found {name}; it is set by {OURS[name]}")
        if names and name not in names:
            raise ConfigError(f"expected an argument of vLLM's AsyncEngineArgs, found {name}; {nearest(name, names)}")
