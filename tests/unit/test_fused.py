"""Small models in one call a forward: against transformers' own code, and bit for bit against themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from generator_support import VOCAB, make_engine, perturbed, tensors_of, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from orz_async.errors import ModelError
from orz_async.generator import fused
from orz_async.generator.batch import Work
from orz_async.generator.model import SlotModel
from orz_async.ops import backend

# Grouped and single heads, with and without biases, normalised heads, windows in all layers and in one, tied or not,
# scaled positions, a width of one and a half panels and one of many folds.
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-wide": ("qwen2", {"hidden_size": 200, "intermediate_size": 601, "head_dim": 26}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4, "head_dim": 12}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "llama": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "mistral": ("mistral", {"tie_word_embeddings": True}),
}
SLOTS, TOKENS = 6, 60
LENGTHS = [9, 3, 42, 9, 1, 33]
"""Of the slots, after all work."""


@pytest.fixture(params=["reference", "cpu"])
def ops_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def made(name: str) -> PreTrainedModel:
    architecture, changes = MODELS[name]
    return tiny_model(architecture, **changes)


def work(seed: int = 0) -> list[Work]:
    """Three prompts for five slots, one token for each, and both at once."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(0, VOCAB, length) for length in (7, 1, 40)]
    lengths = np.array([7, 1, 40, 7, 40])
    new = [draw.integers(0, VOCAB, length) for length in (1, 33)]
    return [
        Work(prefixes=prompts, slots=range(5), source=[0, 1, 2, 0, 2]),
        Work(draw.integers(0, VOCAB, 5), lengths),
        Work(draw.integers(0, VOCAB, 4), lengths[:4] + 1, new, slots=[5, 4], source=[1, 0]),
    ]


def logits(model: PreTrainedModel, *, packed: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Of all that work, and the cache after it."""
    slots = SlotModel(model, slots=SLOTS, max_tokens=TOKENS)
    assert slots._fused is not None
    found = torch.cat([slots._packed(one) if packed else slots.forward(one) for one in work()])
    return found, [slots.cache.layer(n, torch.empty(0), torch.empty(0)) for n in range(2)]


@torch.no_grad()
def exact_logits(model: PreTrainedModel) -> Tensor:
    """Of the same work in float64, by a plain forward for each row. (RMSNorm rounds to float32 even then.)"""
    model = model.double()
    model.set_attn_implementation("eager")
    sequences: dict[int, list[int]] = {}
    rows = []
    for one in work():
        for slot, token in enumerate(one.decode_tokens.tolist()):
            sequences[slot].append(token)
        for slot, source in zip(one.slots, one.source, strict=True):
            sequences[slot] = one.prefixes[source].tolist()
        for slot in [*range(len(one.decode_tokens)), *one.slots]:
            rows.append(model(input_ids=torch.tensor([sequences[slot]]), use_cache=False).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.usefixtures("ops_backend")
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_code_and_float64(name: str) -> None:
    found, caches = logits(made(name))
    packed, wanted = logits(made(name), packed=True)
    exact = exact_logits(made(name))
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, atol=2e-6 * scale, rtol=0)
    torch.testing.assert_close(found, packed, atol=2e-6 * scale, rtol=0)
    for one, other in zip(caches, wanted, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            for slot, length in enumerate(LENGTHS):
                atol = 4e-6 * float(theirs.abs().max())
                torch.testing.assert_close(mine[slot, :, :length], theirs[slot, :, :length], atol=atol, rtol=0)


def test_bits_do_not_depend_on_neighbours_or_on_how_the_tokens_came(ops_backend: str) -> None:
    # A library may multiply by another kernel where a width is no multiple of its vectors; ours does not.
    model = made("qwen2-wide" if ops_backend == "cpu" else "qwen2")
    whole, caches = logits(model)
    if ops_backend == "cpu":
        torch.set_num_threads(2)
        assert torch.equal(whole, logits(model)[0])
        torch.set_num_threads(1)
    prompt, first, second = (
        one.tolist() for one in (work()[0].prefixes[2], *(w.decode_tokens[2:3] for w in work()[1:]))
    )
    alone = SlotModel(model, slots=1, max_tokens=TOKENS)
    found = alone.forward(Work(prefixes=[np.array(prompt + first)], slots=[0], source=[0]))
    assert torch.equal(found[0], whole[5 + 2])
    found = alone.forward(Work(np.array(second), np.array([41])))
    assert torch.equal(found[0], whole[10 + 2])
    for mine, theirs in zip(alone.cache.layer(1, found, found), caches[1], strict=True):
        assert torch.equal(mine[0, :, :42], theirs[2, :, :42])


def test_what_is_not_finite_stays_in_its_row() -> None:
    slots = SlotModel(made("llama"), slots=SLOTS, max_tokens=TOKENS)
    slots.model.model.embed_tokens.weight[7, 3] = torch.nan
    slots._fused = slots._fuse()
    prefixes = [np.array([1, 2]), np.array([7, 2]), np.array([3])]
    found = slots.forward(Work(prefixes=prefixes, slots=[0, 1, 2], source=[0, 1, 2])).isfinite()
    assert found.all(1).tolist() == [True, False, True]
    assert not found[1].any()
    found = slots.forward(Work(np.array([4, 4, 7]), np.array([2, 2, 1]))).isfinite()
    assert found.all(1).tolist() == [True, False, False]


def test_new_weights_are_taken_over() -> None:
    engine = make_engine(made("qwen3"))
    other = perturbed(made("qwen3"), 3, 0.1)
    engine.apply(1, tensors_of(other))
    one = Work(prefixes=[np.array([1, 2, 3])], slots=[0], source=[0])
    assert torch.equal(engine._model.forward(one), SlotModel(other, slots=1, max_tokens=TOKENS).forward(one))
    engine.apply(2, {name: tensor.double() for name, tensor in tensors_of(other).items()})
    assert engine._model._fused is None  # float64 is computed by the model's own code


def test_a_model_that_differs_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(fused.fits(made(name)) for name in MODELS)
    assert not fused.fits(tiny_model("gemma2"))
    assert not fused.fits(tiny_model("llama", hidden_act="gelu"))
    assert not fused.fits(tiny_model("llama", rope_parameters=YARN | {"rope_type": "dynamic"}))
    assert not fused.fits(made("llama").bfloat16())
    hooked, replaced = made("llama"), made("llama")
    hooked.model.layers[1].register_forward_pre_hook(lambda *_: None)
    replaced.lm_head = torch.nn.Sequential(replaced.lm_head)
    assert not fused.fits(hooked)
    assert not fused.fits(replaced)
    monkeypatch.setattr(fused, "MOST_PARAMETERS", 1000)
    assert not fused.fits(made("llama"))


def test_the_self_check_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fused._network

    def off(model: PreTrainedModel, positions: int) -> Any:
        return dataclasses.replace(network(model, positions), scale=0.5)

    monkeypatch.setattr(fused, "_network", off)
    with pytest.raises(ModelError, match="other logits over the slot cache"):
        SlotModel(made("qwen2"), slots=1, max_tokens=TOKENS)
