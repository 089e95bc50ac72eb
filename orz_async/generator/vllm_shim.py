"""All that is asked of vLLM by name, so that another version of it is met in this file alone.

Written against 0.32, where per-token versions, weight updates and the pause are public API. 0.27 is the first whose
engine keeps the version of its weights, which `vllm_labels` brings to the tokens where vLLM does not; what is older is
refused: tokens labelled from outside can be wrong.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Mapping
from typing import Any

from orz_async.errors import ConfigError
from orz_async.generator.vllm_options import refuse
from orz_async.generator.vllm_plugin import BACKEND

OLDEST, TOO_NEW = (0, 27), (0, 33)

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # the daemon has threads, and a fork of threads can hang
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" gives every daemon of a machine the same cores
}
"""Set before vLLM is imported, unless the user has set them."""

CPU_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",  # two small functions of its sampler would be compiled at the first token: 30 s
}


def require_vllm() -> str:
    """The version of vLLM, installed under either of its names; ConfigError says what to install."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", version)
        found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        if not OLDEST <= found < TOO_NEW:
            raise ConfigError(
                f"expected vLLM from {OLDEST[0]}.{OLDEST[1]} to below {TOO_NEW[0]}.{TOO_NEW[1]}, found {version}: "
                "older engines do not know the version of their weights, newer ones are untried; install vllm==0.32.0"
            )
        if not any(one.name == "orz_async" for one in importlib.metadata.entry_points(group="vllm.general_plugins")):
            raise ConfigError(
                "expected orz_async among the plugins of vLLM, found it not installed in this environment: "
                "`pip install --no-deps -e .` in its checkout, or `make vllm-dev`"
            )
        return version
    raise ConfigError(
        "expected vLLM for --engine vllm, found none in this environment; on a GPU `pip install 'orz_async[vllm]'`, "
        "on a CPU `make vllm-dev` makes .venv-vllm, to be named with --generator.python .venv-vllm/bin/python"
    )


def prepare_environment(*, threads: int, kv_gb: float, one_worker: bool = True) -> None:
    """Must come before vLLM is imported in this process. `one_worker`: the engine has one device."""
    from torch import cuda

    wanted = dict(ENVIRONMENT)
    if not cuda.is_available():
        wanted |= CPU_ENVIRONMENT
        if one_worker:
            # The worker then lives in the engine's process, which has the right number of threads already: one process
            # less to start, and no queue between the two for every token.
            wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", f"{kv_gb:g}")
    os.environ["OMP_NUM_THREADS"] = str(threads)


def make_engine_args(
    *,
    model: str,
    dtype: str,
    slots: int,
    max_model_tokens: int,
    prefill_tokens: int,
    tensor_parallel: int,
    data_parallel: int,
    options: Mapping[str, Any],
) -> Any:
    """`AsyncEngineArgs` of an engine that samples from the policy itself and reports the log-probs it sampled with."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    refuse(options, [one.name for one in dataclasses.fields(AsyncEngineArgs)])
    settings: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model's: its top_p and penalties would bias the samples
        "logprobs_mode": "processed_logprobs",  # the default ignores the temperature
        "max_num_seqs": slots,
        "max_model_len": max_model_tokens,
        "max_num_batched_tokens": max(prefill_tokens, slots, max_model_tokens),
        "tensor_parallel_size": tensor_parallel,
        "data_parallel_size": data_parallel,
        "enable_prefix_caching": True,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "enforce_eager": current_platform.is_cpu(),  # compiling takes a minute and gains little on a CPU
        "disable_log_stats": True,
        # Tokens come in batches of so many: telling the daemon of each costs more than sampling it from a small model.
        # A stop string of several tokens is seen that much later, and what follows it is cut off.
        "stream_interval": 8,
        "seed": 0,
    }
    if current_platform.is_cpu():
        # A chunk that is not a prompt's last draws a token and takes the draw back, which generators on CPU cannot:
        # the engine would die. Whole prompts need max_num_batched_tokens >= max_model_len, which is so above.
        settings["enable_chunked_prefill"] = False
    if tensor_parallel == data_parallel == 1:
        settings["distributed_executor_backend"] = "uni"
    return AsyncEngineArgs(**(settings | dict(options)))


def make_sampling(*, temperature: float, seed: int, max_tokens: int, stop_tokens: list[int]) -> Any:
    """`SamplingParams` of one rollout: nothing but the policy at a temperature, and the log-prob of what it chose."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=stop_tokens,
        ignore_eos=True,  # the end-of-sequence tokens are among the stop tokens
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )


def make_prompt(tokens: list[int], salt: str) -> Any:
    """Tokens in; the salt keeps prefixes computed by other weights from being reused."""
    from vllm import TokensPrompt

    return TokensPrompt(prompt_token_ids=tokens, cache_salt=salt)


async def update_weights(llm: Any, update: Mapping[str, Any], version: str) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await llm.start_weight_update()
    await llm.update_weights(WeightTransferUpdateRequest(update_info=dict(update)))
    await llm.finish_weight_update(weight_version=version)


def kv_tokens(llm: Any) -> int:
    """Tokens whose keys and values fit at once; 0 if the engine does not say."""
    cache = llm.vllm_config.cache_config
    return (
        int(cache.num_gpu_blocks or 0)
        * int(cache.block_size or 0)
        * int(llm.vllm_config.parallel_config.data_parallel_size)
    )
