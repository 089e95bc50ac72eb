"""What the learner's tests share: tiny random models in the real on-disk format, rollouts, a trainer."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from orz_async.config import BrokerConfig, CheckpointConfig, Config, EvalConfig, LearnerConfig, ModelConfig
from orz_async.learner.batch import make_microbatch, make_step_batch
from orz_async.learner.model import Policy, build_critic, load_policy
from orz_async.learner.parallel import World
from orz_async.learner.trainer import Trainer
from orz_async.records import Span, Trajectory, float32_bytes, int32_bytes

transformers.logging.disable_progress_bar()

VOCAB = 31

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
WINDOWED = {"sliding_window": 5}


def model_config(family: str) -> transformers.PreTrainedConfig:
    """One tiny config of every family, and the variants that reach other branches of the attention."""
    match family:
        case "qwen2":
            return transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True)
        case "qwen2_windowed":
            return transformers.Qwen2Config(**SHAPE, **WINDOWED, use_sliding_window=True, max_window_layers=1)
        case "qwen3":
            # Heads wider than hidden / heads, as the real ones are.
            return transformers.Qwen3Config(**(SHAPE | {"head_dim": 16}), tie_word_embeddings=False)
        case "llama":
            return transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
        case "mistral":
            return transformers.MistralConfig(**SHAPE, **WINDOWED)
        case "gemma":
            return transformers.GemmaConfig(**SHAPE)
        case "gemma2":
            return transformers.Gemma2Config(
                **SHAPE, **WINDOWED, query_pre_attn_scalar=8, final_logit_softcapping=None, attn_logit_softcapping=2.0
            )
        case "gemma2_capped":
            return transformers.Gemma2Config(
                **SHAPE, **WINDOWED, query_pre_attn_scalar=8, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
            )
        case "gemma3":
            return transformers.Gemma3TextConfig(**SHAPE, **WINDOWED, query_pre_attn_scalar=8)
    raise AssertionError(family)


FAMILIES = ("qwen2", "qwen2_windowed", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma2_capped", "gemma3")


def random_causal_lm(family: str = "qwen2", *, seed: int = 0) -> Any:
    """Weights large enough that attention is far from uniform and a wrong mask shows."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(model_config(family), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def save_model(directory: Path, family: str = "qwen2", *, seed: int = 0) -> Path:
    random_causal_lm(family, seed=seed).save_pretrained(directory)
    return directory


class ExactNorm(torch.nn.Module):
    """transformers computes RMSNorm in float32 whatever the model is: 1e-7 of noise, which Adam's division turns into
    a changed sign where a gradient is nearly 0. In both models of a comparison this one takes its place."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)


def exact_norms(module: Any) -> Any:
    for name, child in module.named_children():
        if hasattr(child, "variance_epsilon"):
            setattr(module, name, ExactNorm(child))
        else:
            exact_norms(child)
    return module


def config(model: Path | str = "", **changes: Any) -> Config:
    """A tiny configuration; `learner`, `broker`, `eval`, `checkpoint` are dictionaries of changed fields."""
    learner = {
        "lr": 1e-3,
        "critic_lr": 3e-3,
        "warmup_steps": 0,
        "critic_steps": 2,
        "max_tokens": 64,
        "audit_rollouts": 0,
    }
    broker = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_lag": 1}
    return Config(
        model=ModelConfig(path=str(model)),
        learner=LearnerConfig(**(learner | changes.pop("learner", {}))),
        broker=BrokerConfig(**(broker | changes.pop("broker", {}))),
        eval=EvalConfig(**({"every": 0} | changes.pop("eval", {}))),
        checkpoint=CheckpointConfig(**({"every": 50} | changes.pop("checkpoint", {}))),
        **changes,
    )


def trainer(
    config: Config, world: World | None = None, *, dtype: torch.dtype = torch.float32, exact: bool = False
) -> Trainer:
    """`exact`: norms are computed in `dtype` too."""
    policy = load_policy(config.model.path)
    critic = build_critic(policy, seed=config.seed)
    for module in (policy, critic) if exact else ():
        exact_norms(module)
    with torch.no_grad():
        # The real initialisation is so small that a value loss would hardly depend on the backbone.
        critic.score.weight.mul_(5.0)
    return Trainer(config, policy.to(dtype), critic.to(dtype), world or World.single())


def trajectory(rng: np.random.Generator, rollout: int, *, version: int = 0, lag: int = 0, **changes: Any) -> Trajectory:
    """Random tokens; with lag, the second half was sampled by `version` and the first by a version that much older."""
    length, prompt = int(rng.integers(1, 24)), int(rng.integers(1, 9))
    spans = (Span(version - lag, 0), Span(version, length // 2)) if lag and length > 1 else (Span(version - lag, 0),)
    made = Trajectory(
        kind="train",
        rollout=rollout,
        attempt=0,
        prompt_id=str(rollout // 2),
        sample=rollout % 2,
        prompt=int32_bytes(rng.integers(0, VOCAB, prompt)),
        response=int32_bytes(rng.integers(0, VOCAB, length)),
        logprobs=float32_bytes(-rng.uniform(0.5, 6.0, length)),
        spans=spans,
        reward=float(rng.integers(0, 2)),
        finish="stop",
        verdict="correct",
        generator="test",
        generate_s=0.5,
    )
    return msgspec.structs.replace(made, **changes)


def rollouts(count: int, *, seed: int = 0, version: int = 0, max_lag: int = 0) -> list[Trajectory]:
    rng = np.random.default_rng([seed, count])
    made = [trajectory(rng, n, version=version, lag=min(version, max_lag) * (n % 2)) for n in range(count)]
    # Two samples of each prompt, and one ran into the limit: reward 0, kept, and its last token is an ordinary one.
    made = [msgspec.structs.replace(t, prompt=made[n - n % 2].prompt) for n, t in enumerate(made)]
    return [msgspec.structs.replace(made[0], reward=0.0, finish="length", verdict="truncated"), *made[1:]]


def with_sampled(made: Trajectory, logprobs: np.ndarray[Any, Any]) -> Trajectory:
    return msgspec.structs.replace(made, logprobs=float32_bytes(logprobs))


def sampled_by(policy: Policy, made: list[Trajectory], *, noise: float) -> list[Trajectory]:
    """The same tokens with the log-probs this policy gives them, moved a little as by a policy some steps older."""
    batch = make_step_batch(made, version=max(t.spans[-1].version for t in made), max_lag=1, share_prompts=False)
    micro = make_microbatch(batch, range(len(made)), torch.device("cpu"))
    with torch.no_grad():
        logprobs_M, _ = policy(micro, temperature=1.0)
    moved_M = logprobs_M.numpy() + np.random.default_rng(len(made)).normal(0.0, noise, len(logprobs_M))
    parts = np.split(np.minimum(moved_M, 0.0), batch.cu_responses_B1[1:-1])
    return [with_sampled(t, part) for t, part in zip(made, parts, strict=True)]


def changed(base: Config, **learner: Any) -> Config:
    return dataclasses.replace(base, learner=dataclasses.replace(base.learner, **learner))


class Peak(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref[Any]] = {}

    def note(self, tensors: Any) -> None:
        tree_map_only(Tensor, self._note, tensors)

    def grown(self, tensors: list[Tensor], act: Callable[[], object]) -> int:
        """The most bytes that lived during `act` beside `tensors`."""
        self.note(tensors)
        before = self.peak = self.now
        with self:
            act()
        return self.peak - before

    def _note(self, tensor: Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        known = self.alive.get(key)
        if not size or tensor.is_meta or (known is not None and known() is storage):
            return

        def gone(ref: Any) -> None:
            self.now -= size
            if self.alive.get(key) is ref:
                del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(out)
        return out
