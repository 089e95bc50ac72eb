"""The CUDA C++ kernels without a GPU: their math on the host against float64, and what a launch says here."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import ops_oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "kernels"))  # a checkout need not be installed
MANY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler: expected g++ or c++ on PATH, found neither"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    source, headers = ROOT / "tests" / "ops" / "cuda_host.cpp", ROOT / "csrc" / "cuda"
    command = [compiler, *flags, "-static-libubsan", "-shared", "-fPIC", f"-I{headers}", "-o", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(out))


def address(x: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def real(x: float) -> ctypes.c_float:
    return ctypes.c_float(x)


def run_gae(host, rewards, values, starts, gamma, lam, mask, boot, threads):
    out = torch.full((2, len(rewards)), torch.nan)
    host.host_gae(
        *map(address, (rewards, values, mask, starts, boot)), ctypes.c_int64(len(rewards)), len(starts) - 1,
        real(gamma), real(gamma * lam), real(gamma * (1 - lam)), threads, address(out[0]), address(out[1]),
    )  # fmt: skip
    return out


@MANY
@given(data=st.data())
def test_gae_on_ragged_batches(host, data):
    lengths = data.draw(st.lists(st.one_of(st.integers(0, 5), st.integers(20, 90)), min_size=1, max_size=8))
    gamma, lam = (data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])) for _ in range(2))
    n, threads = sum(lengths), data.draw(st.sampled_from([1, 4, 32]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    rewards, values, boots = (torch.randn(k, generator=generator) for k in (n, n, len(lengths)))
    mask = torch.rand(n, generator=generator) < 0.7 if data.draw(st.booleans()) else None
    boot = boots if data.draw(st.booleans()) else None
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    expected = torch.stack(ops_oracle.gae(rewards, values, starts, gamma, lam, mask, boot))
    if mask is not None:
        rewards[~mask] = values[~mask] = torch.nan
    found = run_gae(host, rewards, values, starts, gamma, lam, mask, boot, threads)
    assert n == 0 or float((found.double() - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


def test_gae_of_the_longest_sequence_is_exact_at_one(host):
    n = 131_072 + 3
    rewards, values = torch.randint(-3, 4, (n,)).float(), torch.randint(-8, 8, (n,)).float()
    found = run_gae(host, rewards, values, torch.tensor([0, n], dtype=torch.int32), 1.0, 1.0, None, None, 512)
    assert torch.equal(found[1].double(), rewards.double().flip(0).cumsum(0).flip(0))
    assert torch.equal(found[0], found[1] - values)


def test_gae_does_not_depend_on_the_block_and_repeats_bitwise(host):
    rewards, values, starts = torch.randn(3000), torch.randn(3000), torch.tensor([0, 7, 900, 3000], dtype=torch.int32)
    args = (rewards, values, starts, 0.99, 0.95, torch.rand(3000) < 0.9, torch.randn(3))
    first = run_gae(host, *args, 512)
    assert all(torch.equal(first, run_gae(host, *args, 512)) for _ in range(20))
    for threads in (1, 3, 64):
        assert float((run_gae(host, *args, threads) - first).abs().max()) <= 2e-5


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dual", [None, 2.0])
def test_ppo_loss(host, decoupled, dual):
    """Log-ratios of 1e-6 to 20, advantages of both signs, hidden tokens full of NaN."""
    n = 400
    sampled, advantages, entropy = -3 * torch.rand(n), torch.randn(n), torch.rand(n)
    size = torch.logspace(-6, math.log10(19.9), n)
    current = (sampled + size * torch.where(torch.rand(n) < 0.5, -1.0, 1.0)).requires_grad_()
    proximal = sampled + 0.4 * torch.randn(n) if decoupled else None
    mask = torch.rand(n) < 0.8
    options = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": dual}
    if proximal is not None:
        mask &= (current.detach() - proximal).abs() < 20
        options |= {"proximal": proximal[mask], "behaviour_cap": 1.3}
    terms = ops_oracle.policy_loss_terms(current[mask], sampled[mask], advantages[mask], **options)
    expected = terms.sum() / 7
    (slope,) = torch.autograd.grad(expected, current)
    stats = ops_oracle.policy_stats(current.detach()[mask], sampled[mask], advantages[mask], entropy[mask], **options)
    inputs = [current.detach().clone(), sampled, advantages, proximal, entropy]
    for x in inputs:
        if x is not None:
            x[~mask] = torch.nan
    slopes, sums, seven = torch.full((n,), torch.nan), torch.zeros(15, dtype=torch.float64), torch.tensor(7.0)
    host.host_ppo_loss(
        *map(address, (*inputs, mask, seven)), 0, real(0.9), real(1.3), real(dual or math.inf),
        real(1.3 if decoupled else math.inf), ctypes.c_int64(n), address(slopes), address(sums),
    )  # fmt: skip
    assert torch.allclose(slopes, slope, rtol=2e-5, atol=1e-9)
    count = stats["tokens"]
    names = ["tokens", "loss", "clip_low", "clip_high", "clip_dual", "ratio_mean", "ratio_max", "ratio_min", "kl_k1"]
    names += ["kl_k3", "weight_mean", "weight_capped", "rho", "square", "entropy"]
    found = dict(zip(names, sums.tolist(), strict=True))
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    for name in ("ratio_max", "ratio_min"):
        assert found[name] == pytest.approx(stats[name], rel=2e-5), name
    for name in set(names) - {"tokens", "loss", "ratio_max", "ratio_min", "rho", "square"}:
        assert found[name] / count == pytest.approx(stats[name], rel=5e-5, abs=1e-6), name
    assert found["rho"] ** 2 / (count * found["square"]) == pytest.approx(stats["ess"], rel=1e-4)


@pytest.mark.parametrize("drift", [1e-5, 3e-4, -3e-4, 0.49, 0.51, -2.0])
def test_k3_does_not_cancel(host, drift):
    sampled = torch.full((1,), -1.0)
    current, one = sampled + drift, torch.ones(1)
    slopes, sums = torch.empty(1), torch.zeros(15, dtype=torch.float64)
    host.host_ppo_loss(
        *map(address, (current, sampled, one, None, None, None, one)), 0, *map(real, (0.8, 1.2, math.inf, math.inf)),
        ctypes.c_int64(1), address(slopes), address(sums),
    )  # fmt: skip
    exact = float(current) - float(sampled)
    assert float(sums[9]) == pytest.approx(math.expm1(exact) - exact, rel=5e-6)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(host, clip):
    n = 300
    # Values far smaller than their moves: there old + (value - old) is not the value, and must not count as clipped.
    values = (torch.randn(n) * torch.logspace(-4, 0, n)).requires_grad_()
    old, returns = values.detach() + 0.3 * torch.randn(n), torch.randn(n)
    mask, denominator = torch.rand(n) < 0.7, 1 + torch.rand(n)
    expected = (ops_oracle.value_loss_terms(values, old, returns, clip) / denominator.double())[mask].sum()
    (slope,) = torch.autograd.grad(expected, values)
    kept, total = values.detach()[mask].double(), returns[mask].double()
    plain = values.detach().clone()
    plain[~mask] = torch.nan
    slopes, sums = torch.full((n,), torch.nan), torch.zeros(8, dtype=torch.float64)
    host.host_value_loss(
        *map(address, (plain, old, returns, mask, denominator)), 1, real(clip or math.inf), ctypes.c_int64(n),
        address(slopes), address(sums),
    )  # fmt: skip
    assert torch.allclose(slopes, slope, rtol=1e-5, atol=1e-7)
    error = total - kept
    clipped = float((slope[mask] == 0).sum())
    wanted = [len(kept), float(expected.detach()), clipped, kept.sum(), total.sum(), total.square().sum(), error.sum()]
    for found, want in zip(sums.tolist(), [*wanted, error.square().sum()], strict=True):
        assert found == pytest.approx(float(want), rel=2e-5, abs=1e-4)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build the library with")
def test_library_opens_without_a_gpu_and_says_what_is_missing(tmp_path):
    """In a process of its own: the runtime decides about devices once."""
    code = (
        "import sys, pathlib; from orz_kernels import cuda; built = cuda.build(pathlib.Path(sys.argv[1]));"
        "opened = cuda.library(built);"
        "print(opened.orz_gae_blocks(5000));"
        "print(opened.orz_cuda_error(opened.orz_gae(*[None] * 8, 5000, 1, 1.0, 1.0, 0.0, None)).decode())"
    )
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT / "kernels"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    blocks, message = done.stdout.splitlines()
    assert blocks == "3"
    assert "CUDA" in message


def test_a_library_of_another_system_is_an_import_error(tmp_path, host):
    pytest.importorskip("triton", reason="the package triton is not installed")
    from orz_kernels import cuda

    junk = tmp_path / "liborz_cuda.so"
    junk.write_bytes(b"of another system")
    with pytest.raises(ImportError, match=r"expected a library that opens here, found: .*build csrc/cuda again"):
        cuda.library(junk)
    with pytest.raises(ImportError, match=r"expected a library that opens here, found: .*orz_cuda_interface"):
        cuda.library(Path(host._name))


def test_what_is_not_on_a_gpu_is_refused():
    pytest.importorskip("triton", reason="the package triton is not installed")
    from orz_kernels import cuda

    with pytest.raises(ValueError, match=r"expected tensors on a CUDA device, found cpu; set ORZ_BACKEND"):
        cuda.gae(torch.ones(2), torch.ones(2), torch.tensor([0, 2]), 1.0, 1.0, None, None)
