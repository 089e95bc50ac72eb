"""Which modules get our forward on a CPU, and that nothing else of them changes."""

from __future__ import annotations

import copy

import pytest
import torch
from learner_kit import FAMILIES, VOCAB, random_causal_lm

from orz_async import ops
from orz_async.learner.fused import fuse

OURS = {"qwen2", "qwen3", "llama", "mistral"}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    plain = random_causal_lm(family)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    calls = {"rms_norm": 0, "silu_mul": 0}
    for name in calls:

        def counted(*given: object, name: str = name, op: object = getattr(ops, name)) -> object:
            calls[name] += 1
            return op(*given)  # type: ignore[operator]

        monkeypatch.setattr(ops, name, counted)
    tokens = (torch.arange(24) * 7 % VOCAB).view(2, 12)
    gradients = []
    outputs = []
    for model in (plain, copy.deepcopy(fused)):
        outputs.append(model.model(tokens, use_cache=False).last_hidden_state)
        (outputs[-1] * torch.linspace(-1, 1, outputs[-1].numel()).view_as(outputs[-1])).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    scale = max(float(grad.abs().max()) for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-5 * scale, rtol=1e-4)
    known = family.split("_")[0] in OURS
    assert (calls["rms_norm"] > 0, calls["silu_mul"] > 0) == (known, known)


def test_other_dtypes_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_causal_lm("qwen2").double()
    tokens = torch.arange(9)[None]
    want = model.model(tokens, use_cache=False).last_hidden_state
    fuse(model)
    monkeypatch.setattr(ops, "rms_norm", None)
    monkeypatch.setattr(ops, "silu_mul", None)
    assert torch.equal(model.model(tokens, use_cache=False).last_hidden_state, want)


def test_twice_is_once() -> None:
    model = random_causal_lm("qwen2")
    fuse(model)
    kinds = [type(module) for module in model.modules()]
    fuse(model)
    assert [type(module) for module in model.modules()] == kinds
