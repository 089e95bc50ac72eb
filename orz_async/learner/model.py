"""Policy and critic: a transformers backbone over packed tokens, and a head applied to response rows only.

The heads are called inside the root module's forward, because that is when FSDP2 holds the root's weights (embedding,
final norm, head) unsharded. Rows are selected before the head: prompt tokens never pay for the vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from orz_async import ops
from orz_async.errors import ModelError
from orz_async.learner import attention
from orz_async.learner.batch import Microbatch
from orz_async.learner.hf_directory import inspect


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTerms:
    """What the policy loss needs beside the tokens of a microbatch."""

    advantages_M: Tensor
    denominator_M: Tensor
    """Each token's loss is divided by its own entry: the global count, or a weight for another aggregation."""
    clip_low: float
    clip_high: float
    dual_clip: float | None
    behaviour_cap: float | None
    proximal_logprobs_M: Tensor | None = None
    """Given: the decoupled objective."""
    proximal_is_current: bool = False
    """Decoupled, and the policy has not moved yet: its own log-probs, detached, are the proximal ones."""


class Policy(nn.Module):
    """Parameter names are those of the Hugging Face causal LM; the module is never in training mode (no dropout)."""

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.config: PreTrainedConfig = getattr(causal_lm, "config")  # noqa: B009 (nn.Module hides its type)
        self.model: nn.Module = causal_lm.get_submodule("model")
        self.lm_head: nn.Module = causal_lm.get_submodule("lm_head")
        self.eval()

    @property
    def layers(self) -> nn.ModuleList:
        return _layers(self.model)

    def forward(
        self, batch: Microbatch, *, temperature: float, terms: PolicyTerms | None = None
    ) -> ops.PpoHeadOutput | tuple[Tensor, Tensor]:
        """Without `terms`: (logprobs_M, entropy_M) of the response tokens. With them: the loss and its statistics."""
        hidden_MD = _response_rows(self.model, batch)
        weight_VD = self.lm_head.weight
        assert isinstance(weight_VD, Tensor)
        if terms is None:
            return ops.head_logprob(hidden_MD, weight_VD, batch.targets_M, temperature=temperature)
        proximal_M = terms.proximal_logprobs_M
        if terms.proximal_is_current:
            with torch.no_grad():
                proximal_M, _ = ops.head_logprob(hidden_MD, weight_VD, batch.targets_M, temperature=temperature)
        output = ops.ppo_head(
            hidden_MD,
            weight_VD,
            batch.targets_M,
            batch.sampled_logprobs_M,
            terms.advantages_M,
            temperature=temperature,
            proximal_logprobs_N=proximal_M,
            clip_low=terms.clip_low,
            clip_high=terms.clip_high,
            dual_clip=terms.dual_clip,
            behaviour_cap=terms.behaviour_cap,
            mask_N=batch.mask_M,
            denominator=terms.denominator_M,
        )
        # FSDP2 hangs its backward hook on what leaves the root module, which for its sake must not be a view.
        return output._replace(loss=output.loss.clone())


class Critic(nn.Module):
    """The same backbone with a scalar head. Names are those of a Hugging Face token classifier with one label."""

    def __init__(self, backbone: nn.Module, config: PreTrainedConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.model = backbone
        width = int(config.hidden_size)
        self.score = nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            # Values start near 0: smaller than any reward, so that the first advantages are those of no critic.
            self.score.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1))
            self.score.bias.zero_()
        self.eval()

    @property
    def layers(self) -> nn.ModuleList:
        return _layers(self.model)

    def forward(self, batch: Microbatch) -> Tensor:
        """[M], float32 at least: the value of the state before each response token."""
        values_M1: Tensor = self.score(_response_rows(self.model, batch))
        wide = torch.promote_types(values_M1.dtype, torch.float32)
        # A copy, not a view: see Policy.forward.
        return values_M1.squeeze(1).to(wide, copy=True)


def _layers(backbone: nn.Module) -> nn.ModuleList:
    layers = backbone.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def _response_rows(backbone: nn.Module, batch: Microbatch) -> Tensor:
    output = backbone(
        input_ids=batch.tokens_N.unsqueeze(0),
        position_ids=batch.positions_N.unsqueeze(0),
        use_cache=False,
        layout=batch.layout,
    )
    hidden_MD: Tensor = output.last_hidden_state[0].index_select(0, batch.rows_M)
    return hidden_MD


def load_policy(path: str | Path) -> Policy:
    """The policy in float32 from config.json and safetensors; nothing in the directory is executed."""
    directory = inspect(path)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory.path,
            dtype=torch.float32,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: expected a loadable model, found: {error}") from error
    causal_lm, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        raise ModelError(f"{path}: expected every weight of config.json in the safetensors files, found {wrong}")
    return Policy(causal_lm)


def build_critic(policy: Policy, *, seed: int) -> Critic:
    """From the policy as it is now, which at the start of a run is the base model."""
    return Critic(copy.deepcopy(policy.model), policy.config, seed=seed)
