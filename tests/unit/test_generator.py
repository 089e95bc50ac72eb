"""The parts of a generator: sampler, stop strings, reading of the cache, command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orz_async.broker.messages import Welcome
from orz_async.errors import ConfigError, ModelError, PeerLostError
from orz_async.generator.__main__ import address_of, daemon_of, model_of, parser, settings_of, vocab_size_of
from orz_async.generator.attention import split_keys
from orz_async.generator.sampler import uniforms
from orz_async.generator.serving import eos_tokens
from orz_async.generator.stop import StopMatcher
from orz_async.ops import sample
from orz_async.weights.nccl_fetcher import NcclFetcher


def test_uniforms_are_uniform_and_unlike_for_neighbours() -> None:
    seeds_S, positions_P = np.arange(300, dtype=np.uint64), np.arange(300)
    grid_SP = np.stack([uniforms(np.full(300, seed, np.uint64), positions_P) for seed in seeds_S])
    assert grid_SP.min() >= 0 and grid_SP.max() < 1
    # Of 90,000 draws: the standard error of a mean of n draws is 0.289 / sqrt(n); five of them.
    assert abs(grid_SP.mean() - 0.5) < 5 * 0.289 / 300
    assert abs((grid_SP**2).mean() - 1 / 3) < 5 * 0.3 / 300
    assert abs(np.histogram(grid_SP, 10, (0, 1))[0] / 9000 - 1).max() < 5 * 0.01
    neighbours = {
        "next seed": (grid_SP[1:], grid_SP[:-1]),
        "next position": (grid_SP[:, 1:], grid_SP[:, :-1]),
        "both": (grid_SP[1:, 1:], grid_SP[:-1, :-1]),
        "shifted stream": (grid_SP[1:, :-1], grid_SP[:-1, 1:]),
    }
    for what, (one, other) in neighbours.items():
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / 300, what
    assert len(np.unique(grid_SP)) == grid_SP.size


def test_uniforms_are_what_they_were() -> None:
    # A rollout is reproduced from its seed: these numbers may never change.
    found = uniforms(np.array([0, 1, 2**63 - 1], np.uint64), np.array([0, 5, 8191]))
    assert found.tolist() == [0.6524484863740321, 0.7743991716672016, 0.8425845230790328]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    probabilities_V = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.0, 0.125])
    logits_BV = probabilities_V.log().mul(2.0).expand(20_000, 6)  # at temperature 2
    draws_B = torch.from_numpy(uniforms(np.full(20_000, 3, np.uint64), np.arange(20_000)))
    tokens_B, logprobs_B = sample(logits_BV, torch.full((20_000,), 2.0), draws_B)
    counts_V = torch.bincount(tokens_B, minlength=6) / 20_000
    assert counts_V[1] == counts_V[4] == 0
    # Standard error at most 0.0035; five of them.
    torch.testing.assert_close(counts_V, probabilities_V, atol=0.018, rtol=0)
    torch.testing.assert_close(logprobs_B, probabilities_V.log()[tokens_B])


def test_rare_tokens_of_a_large_vocabulary_are_not_rounded_away() -> None:
    logits_V = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    draws_B = uniforms(np.full(60, 5, np.uint64), np.arange(60))
    tokens_B, _ = sample(logits_V.expand(60, -1), torch.ones(60), torch.from_numpy(draws_B))
    cdf_V = np.cumsum(torch.softmax(logits_V.double(), -1).numpy())
    wanted_B = np.searchsorted(cdf_V, draws_B * cdf_V[-1], "right")
    # The probabilities themselves are float32, so a draw next to a boundary may fall on its other side.
    assert (tokens_B.numpy() != wanted_B).mean() < 0.05


def test_the_ends_of_the_unit_interval_give_possible_tokens() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, 4)
    tokens_B, logprobs_B = sample(logits_BV, torch.ones(2), torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64))
    assert tokens_B.tolist() == [1, 2] and torch.isfinite(logprobs_B).all()


def test_logits_that_are_not_finite_show_in_the_logprob() -> None:
    logits_BV = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [0.0, torch.inf], [-torch.inf, -torch.inf]])
    _, logprobs_B = sample(logits_BV, torch.ones(4), torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.isfinite(logprobs_B).tolist() == [True, False, False, False]


def pieces(texts: list[bytes]):  # type: ignore[no-untyped-def]
    """A decoder of byte pieces that, like many, drops one space at the beginning."""
    return lambda tokens: b"".join(texts[token] for token in tokens).decode(errors="replace").removeprefix(" ")


def test_stop_strings_are_found_where_they_are_completed() -> None:
    texts = [b"a", b"</ans", b"wer>", b">", b" ", b"x>y", b"\xe2\x96", b"\x81", b"b"]
    matcher = StopMatcher(("</answer>", "a ", "▁"), pieces(texts), len(texts))
    # Those that hold ">", a space, or a part of a character.
    assert np.flatnonzero(matcher.candidates(np.arange(9))).tolist() == [2, 3, 4, 5, 6, 7]

    def completed(*tokens: int) -> bool:
        return matcher.completed(np.array([8] * 30 + list(tokens), np.int32))

    assert completed(1, 2) and not completed(1) and not completed(1, 3) and not completed(2)
    assert completed(0, 4) and not completed(8, 4)
    assert completed(6, 7) and not completed(6) and not completed(7)
    # The decoder drops a space at the beginning of what it is given: not of this stop string.
    spaced = StopMatcher((" ab",), pieces([b" ", b"a", b"b"]), 3)
    assert spaced.completed(np.array([1, 1, 1, 0, 1, 2], np.int32))
    assert not StopMatcher((), pieces(texts), len(texts)).candidates(np.arange(9)).any()


def test_a_stop_string_at_the_very_start_counts() -> None:
    matcher = StopMatcher(("ab",), pieces([b"a", b"b"]), 2)
    assert matcher.completed(np.array([0, 1], np.int32))


def test_one_long_sequence_does_not_make_all_read_its_length() -> None:
    positions_R = np.full(64, 20)
    assert split_keys(positions_R)[0] == 32 and not len(split_keys(positions_R)[1])
    positions_R[[5, 9]] = [90, 200]
    near, stragglers, far = split_keys(positions_R)
    assert (near, stragglers.tolist(), far) == (32, [5, 9], 224)
    # Half of them long: two passes would cost more.
    positions_R[::2] = 200
    assert split_keys(positions_R)[0] == 224


def test_all_ends_of_a_sequence_are_known() -> None:
    assert eos_tokens(None, 3, [4, 5], None) == {3, 4, 5}


def options(*words: object) -> argparse.Namespace:
    return parser().parse_args([str(word) for word in words])


def test_the_address_comes_from_the_option_or_the_run(tmp_path: Path) -> None:
    assert address_of(options("--connect", "tcp://h:1")) == "tcp://h:1"
    (tmp_path / "address").write_text("tcp://127.0.0.1:7\n")
    assert address_of(options("--run-dir", tmp_path)) == "tcp://127.0.0.1:7"
    with pytest.raises(ConfigError, match="found neither"):
        address_of(options())
    with pytest.raises(ConfigError, match="found 'h:1'"):
        address_of(options("--connect", "h:1"))
    with pytest.raises(PeerLostError, match="is it running"):
        address_of(options("--run-dir", tmp_path / "other", "--reconnect-s", 0))


def test_the_vocabulary_comes_from_the_model_as_far_as_one_is_named(tmp_path: Path) -> None:
    assert (model_of(options()), vocab_size_of("")) == ("", 0)
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "config.toml").write_text(f"[model]\npath = {json.dumps(str(model))}\n")
    assert model_of(options("--run-dir", tmp_path)) == str(model)
    assert model_of(options("--run-dir", tmp_path, "--model", "elsewhere")) == "elsewhere"
    with pytest.raises(ModelError, match="No such file"):
        vocab_size_of(str(model))
    (model / "config.json").write_text('{"text_config": {"vocab_size": 9}}')
    assert vocab_size_of(str(model)) == 9
    (model / "config.json").write_text('{"vocab_size": 7}')
    assert vocab_size_of(str(model)) == 7


def test_bad_options_are_refused() -> None:
    assert settings_of(options("--slots", 3, "--keep-kv")).keep_kv
    for words in (("--threads", 0), ("--slots", 0), ("--queue", -1), ("--prefill-tokens", 0)):
        with pytest.raises(ConfigError, match=r"threads|slots|queue|prefill-tokens"):
            settings_of(options(*words))


def test_a_daemon_is_as_patient_with_a_transfer_as_the_learner_says() -> None:
    daemon = daemon_of(parser().parse_args(["--connect", "tcp://127.0.0.1:1"]), "g")
    try:
        welcome = Welcome("run", "model", (), "nccl://127.0.0.1:1", 0, 1.0, 80, deadline_s=0.7)
        fetcher = daemon._make_fetcher(welcome, 1)
        assert isinstance(fetcher, NcclFetcher) and fetcher._deadline_s == 0.7
        fetcher.close()
    finally:
        daemon.close()
