"""Policy and critic: a transformers backbone over packed tokens, and a head applied to response rows only.

The heads are called inside the root module's forward, because that is when FSDP2 holds the root's weights (embedding,
final norm, head) unsharded. Rows are selected before the head: prompt tokens never pay for the vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from orz_async import ops
from orz_async.learner import head
from orz_async.learner.batch import Microbatch
from orz_async.learner.fused import fuse
from orz_async.learner.hf_directory import ModelDirectory, inspect
from orz_async.learner.loading import load_base, materialise, meta_causal_lm
from orz_async.learner.parallel import like


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
    proximal_mix_M: Tensor | None = None
    """Decoupled, without a pass of its own: the proximal log-prob is this much of the sampled one and the rest of the
    current one, detached. 0 where the policy has not moved since it is proximal."""
    mask_M: Tensor | None = None
    """Given: instead of the microbatch's own, which it must imply."""


class Policy(nn.Module):
    """Parameter names are those of the Hugging Face causal LM; the module is never in training mode (no dropout)."""

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.config: PreTrainedConfig = getattr(causal_lm, "config")  # noqa: B009 (nn.Module hides its type)
        self.model: nn.Module = causal_lm.get_submodule("model")
        self.lm_head: nn.Module = causal_lm.get_submodule("lm_head")
        self.cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        """Gemma 2: logits are cap * tanh(logits / cap)."""
        fuse(self.model)
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
            return head.logprobs(hidden_MD, weight_VD, batch.targets_M, temperature=temperature, cap=self.cap)
        proximal_M = terms.proximal_logprobs_M
        if terms.proximal_mix_M is not None:
            with torch.no_grad():
                current_M, _ = head.logprobs(
                    hidden_MD, weight_VD, batch.targets_M, temperature=temperature, cap=self.cap
                )
                # Not lerp where the mix is 0: the ratio of a token that has not moved must be exactly 1.
                mixed_M = current_M + terms.proximal_mix_M * (batch.sampled_logprobs_M - current_M)
                proximal_M = torch.where(terms.proximal_mix_M == 0, current_M, mixed_M)
        output = head.ppo(
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
            mask_N=batch.mask_M if terms.mask_M is None else terms.mask_M,
            denominator=terms.denominator_M,
            cap=self.cap,
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
        self._seed = seed
        fuse(self.model)
        self.reset_head()
        self.eval()

    @torch.no_grad()
    def reset_head(self) -> None:
        """The head as the seed has it, sharded or not."""
        width = self.score.in_features
        generator = torch.Generator().manual_seed(self._seed)
        # Values start near 0: smaller than any reward, so that the first advantages are those of no critic.
        start = torch.randn(1, width, generator=generator) / (width + 1)
        self.score.weight.copy_(like(start, self.score.weight))
        self.score.bias.zero_()

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


def meta_models(directory: ModelDirectory, *, seed: int, with_critic: bool = True) -> tuple[Policy, Critic | None]:
    """Policy and critic without memory, to be sharded; `load_models` fills them afterwards."""
    policy = Policy(meta_causal_lm(directory))
    if not with_critic:
        return policy, None
    return policy, Critic(meta_causal_lm(directory).get_submodule("model"), policy.config, seed=seed)


def load_models(policy: Policy, critic: Critic | None, directory: ModelDirectory) -> None:
    """All ranks, each reading its own shards: the base model into both, and the critic's head from its seed."""
    load_base(policy, directory)
    if critic is not None:
        load_base(critic, directory, own=("score.weight", "score.bias"))
        critic.reset_head()


def load_policy(path: str | Path) -> Policy:
    """The whole policy in float32 on this process; nothing in the directory is executed."""
    directory = inspect(path)
    policy, _ = meta_models(directory, seed=0, with_critic=False)
    materialise(policy, torch.device("cpu"))
    load_base(policy, directory)
    return policy


def build_critic(policy: Policy, *, seed: int) -> Critic:
    """From an unsharded policy as it is now, which at the start of a run is the base model."""
    return Critic(copy.deepcopy(policy.model), policy.config, seed=seed)
