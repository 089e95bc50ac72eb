"""Loading policy and critic from a Hugging Face directory, and what is wrong with one that is not usable."""

from __future__ import annotations

import json
from pathlib import Path

import learner_kit as kit
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orz_async import ops
from orz_async.errors import ModelError
from orz_async.learner.batch import make_microbatch, make_step_batch
from orz_async.learner.hf_directory import check_tokenizer, inspect, read_shapes
from orz_async.learner.model import PolicyTerms, build_critic, load_policy
from orz_async.records import as_int32


@pytest.mark.parametrize("family", kit.FAMILIES)
def test_logprobs_are_those_of_the_hugging_face_model(tmp_path: Path, family: str) -> None:
    policy = load_policy(kit.save_model(tmp_path, family))
    reference = kit.random_causal_lm(family)
    assert [n for n, _ in policy.named_parameters()] == [n for n, _ in reference.named_parameters()]
    trajectories = kit.rollouts(5)
    batch = make_step_batch(trajectories, version=0, max_lag=0)
    micro = make_microbatch(batch, range(5), torch.device("cpu"))
    with torch.no_grad():
        logprobs_M, _ = policy(micro, temperature=0.7)
        want = []
        for t in trajectories:
            tokens = torch.from_numpy(np.concatenate([as_int32(t.prompt), as_int32(t.response)])[:-1]).long()
            logits = reference(tokens[None], use_cache=False).logits[0, -t.num_response_tokens :]
            want.append(torch.log_softmax(logits.double() / 0.7, -1))
    want_M = torch.cat(want).gather(1, micro.targets_M[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs_M.double(), want_M, atol=1e-5, rtol=1e-5)


def test_sharded_files_load_as_one(tmp_path: Path) -> None:
    whole = load_policy(kit.save_model(tmp_path / "whole", "llama"))
    kit.random_causal_lm("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    sharded = load_policy(tmp_path / "sharded")
    for (name, a), (_, b) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_critic_is_the_backbone_with_a_small_seeded_head(tmp_path: Path) -> None:
    policy = load_policy(kit.save_model(tmp_path))
    critic, again, other = (build_critic(policy, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(critic.score.weight, again.score.weight)
    assert not torch.equal(critic.score.weight, other.score.weight)
    assert critic.score.bias.item() == 0.0
    assert critic.score.weight.std() < 2 / 33
    with torch.no_grad():
        next(critic.model.parameters()).zero_()
    assert next(policy.model.parameters()).abs().sum() > 0, "policy and critic share no memory"


def test_value_of_a_token_does_not_see_it_nor_what_follows(tmp_path: Path) -> None:
    critic = build_critic(load_policy(kit.save_model(tmp_path)), seed=0)
    batch = make_step_batch(kit.rollouts(3), version=0, max_lag=0)
    micro = make_microbatch(batch, range(3), torch.device("cpu"))
    values = critic(micro)
    changed_row = 7
    assert micro.num_response_tokens > changed_row + 1
    token = int(micro.rows_M[changed_row]) + 1  # where response token 7 is read
    micro.tokens_N[token] = (micro.tokens_N[token] + 1) % kit.VOCAB
    after = critic(micro)
    assert torch.equal(values[: changed_row + 1], after[: changed_row + 1])
    assert values[changed_row + 1] != after[changed_row + 1]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2_capped"])
def test_gradient_reaches_head_and_embedding(tmp_path: Path, family: str) -> None:
    """Tied (qwen2), untied (qwen3), capped: the loss of ppo_head is ppo_loss of head_logprob, gradients included."""
    policy = load_policy(kit.save_model(tmp_path, family))
    batch = make_step_batch(kit.rollouts(5), version=0, max_lag=0)
    micro = make_microbatch(batch, range(5), torch.device("cpu"))
    advantages_M = torch.randn(micro.num_response_tokens, generator=torch.Generator().manual_seed(0))
    terms = PolicyTerms(
        advantages_M=advantages_M,
        denominator_M=torch.tensor(float(micro.num_response_tokens)),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        behaviour_cap=None,
    )
    policy(micro, temperature=1.0, terms=terms).loss.backward()
    fused = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    logprobs_M, _ = policy(micro, temperature=1.0)
    loss, _ = ops.ppo_loss(
        logprobs_M, micro.sampled_logprobs_M, advantages_M, denominator=float(micro.num_response_tokens)
    )
    loss.backward()
    assert fused.keys() == dict(policy.named_parameters()).keys()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, atol=1e-6, rtol=1e-4)


def broken(tmp_path: Path, family: str = "llama") -> Path:
    kit.random_causal_lm(family).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_policy(path)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_missing_directory_and_config(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "found no directory", "make-base")
    path = broken(tmp_path)
    (path / "config.json").unlink()
    refused(path, "config.json", "found none")
    (path / "config.json").write_text("{")
    refused(path, "JSON object")


def test_unknown_family(tmp_path: Path) -> None:
    path = broken(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    refused(path, "model_type", "'mamba'", "qwen2")


def test_missing_shard_and_pickled_weights(tmp_path: Path) -> None:
    path = broken(tmp_path)
    next(path.glob("*-00002-*.safetensors")).unlink()
    refused(path, "found no ['model-00002")
    for file in [*path.glob("*.safetensors"), path / "model.safetensors.index.json"]:
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"x")
    refused(path, "convert the pickled weights")


def test_index_may_not_leave_the_directory(tmp_path: Path) -> None:
    path = broken(tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, "plain file names")


@pytest.mark.parametrize("keep", [0, 5, 40, -1], ids=["empty", "no header", "in the header", "in the data"])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = kit.save_model(tmp_path)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:keep])
    refused(path, "model.safetensors", "copy")


def test_header_that_lies(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3, 4)}, file)
    assert read_shapes(file) == {"a": (3, 4)}
    data = file.read_bytes()
    file.write_bytes(data.replace(b"[3,4]", b"[9,4]"))
    with pytest.raises(ModelError, match="fill F32"):
        read_shapes(file)
    file.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    with pytest.raises(ModelError, match="without one"):
        read_shapes(file)


def test_vocabulary_mismatch(tmp_path: Path) -> None:
    path = kit.save_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": kit.VOCAB + 1}))
    refused(path, f"vocab_size = {kit.VOCAB + 1}", f"found {kit.VOCAB}", "different models")
    with pytest.raises(ModelError, match="tokenizer and weights"):
        check_tokenizer(path, tokenizer_size=kit.VOCAB + 1, vocab_size=kit.VOCAB)
    check_tokenizer(path, tokenizer_size=kit.VOCAB - 1, vocab_size=kit.VOCAB)


def test_missing_tensor_is_not_made_up(tmp_path: Path) -> None:
    path = kit.save_model(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, "model.layers.1.mlp.up_proj.weight is missing")
    assert "model.layers.1.mlp.up_proj.weight" not in inspect(path).shapes
