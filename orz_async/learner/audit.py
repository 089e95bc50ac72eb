"""Does the engine sample from the weights the learner published? A few rollouts a step are scored again to find out.

A token of lag 0 is compared for nothing, in the policy update itself. With S >= 1 hardly any token has lag 0, so rank 0
keeps the last S + 1 versions and recomputes some rollouts under the very versions that sampled each of their tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from orz_async.config import Config
from orz_async.learner.batch import StepBatch, make_microbatch, pack_part
from orz_async.learner.lag_table import LagTable
from orz_async.learner.loading import materialise
from orz_async.learner.model import Policy
from orz_async.learner.parallel import like
from orz_async.learner.sample import audited_members

_MAX_BYTES = 1 << 30
"""Of all copies together; a model too large for that is compared at lag 0 only."""


class Auditor:
    """Rank 0 only. Nothing here changes what is trained."""

    def __init__(self, config: Config, policy: Policy, device: torch.device) -> None:
        size = sum(p.numel() * p.element_size() for p in policy.parameters())
        self.enabled = config.learner.audit_rollouts > 0 and size * (config.broker.max_lag + 2) <= _MAX_BYTES
        self._config = config
        self._device = device
        self._versions: dict[int, dict[str, Tensor]] = {}
        if self.enabled:
            self._policy = copy.deepcopy(policy)
            materialise(self._policy, device)
            self._policy.to(getattr(torch, config.model.dtype))

    def remember(self, version: int, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a version that is being published; versions no token may have any more are forgotten."""
        self._versions[version] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}
        for old in [v for v in self._versions if v < version - self._config.broker.max_lag - 1]:
            del self._versions[old]

    def audit(self, batch: StepBatch, table: LagTable) -> None:
        """Add |learner - engine| log-prob of some rollouts to the mismatch of the step."""
        learner = self._config.learner
        if not self.enabled:
            return
        chosen = audited_members(self._config, batch)
        [bins] = pack_part(batch, chosen, max_tokens=learner.max_tokens, num_ranks=1, attention_cost=0.0)
        for members in bins:
            self._compare(batch, members, table)

    def _compare(self, batch: StepBatch, members: list[int], table: LagTable) -> None:
        micro = make_microbatch(batch, members, self._device)
        rows_M = micro.step_rows_M.cpu()
        lag_M = torch.from_numpy(batch.lag_R)[rows_M]
        # Lag 0 is in the table already. With kept keys and values, later spans were computed by mixed weights.
        wanted_M = lag_M > 0
        if self._config.generator.keep_kv:
            first_B = {b: int(batch.lag_R[batch.cu_responses_B1[b]]) for b in members}
            wanted_M &= lag_M == torch.tensor([first_B[b] for b in members]).repeat_interleave(micro.response_lengths_b)
        for lag in sorted(set(lag_M[wanted_M].tolist())):
            state = self._versions.get(batch.version - lag)
            if state is None:
                continue  # the versions before a resume are not kept
            self._load(state)
            with torch.no_grad():
                logprobs_M, _ = self._policy(micro, temperature=self._config.sampling.temperature)
            delta_M = (logprobs_M - micro.sampled_logprobs_M).cpu()
            equal_M = wanted_M & (lag_M == lag)
            table.add_mismatch(lag, delta_M[equal_M], rows_M[equal_M])

    def _load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._policy.named_parameters():
                parameter.copy_(like(state[name], parameter))
