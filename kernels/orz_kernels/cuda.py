"""The CUDA C++ kernels of csrc/cuda, bound by ctypes: raw pointers and a stream, no torch headers.

`gae`, `ppo_loss` and `value_loss` take float32; other dtypes go to the Triton kernels of the same names. `library()`
raises ImportError, and says what to do, where there is none.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
from ctypes import c_char_p, c_float, c_int, c_longlong, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orz_kernels import gae as triton_gae
from orz_kernels import ppo_loss as triton_ppo_loss
from orz_kernels import value_loss as triton_value_loss
from orz_kernels.launching import num_processors

INTERFACE = 1  # of csrc/cuda/orz_cuda.h
NAME = "liborz_cuda.so"
_HERE = Path(__file__).resolve()
SOURCES = _HERE.parents[2] / "csrc" / "cuda"
# Beside the installed package, beside the package of a checkout, or made by `build`.
PLACES = (_HERE.parents[1] / "orz_async", _HERE.parents[2] / "orz_async", _HERE.parents[2] / "build")


def build(folder: Path = PLACES[-1]) -> Path:
    """Compile csrc/cuda with nvcc, for a checkout that is not installed, if what is there is older than its sources.

    The result opens without a GPU too.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ImportError("nvcc: expected the CUDA toolkit on PATH, found none; install it, or set ORZ_BACKEND=triton")
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / NAME
    if built.exists() and built.stat().st_mtime > max(source.stat().st_mtime for source in SOURCES.iterdir()):
        return built
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-cudart", "static"]
    sources = [str(source) for source in sorted(SOURCES.glob("*.cu"))]
    command = [nvcc, *flags, "--shared", "-Xcompiler", "-fPIC", "-o", str(built), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImportError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return built


def find() -> Path:
    for place in PLACES:
        if (place / NAME).exists():
            return place / NAME
    raise ImportError(
        f"{NAME}: expected it in one of {[str(place) for place in PLACES]}, found it in none; "
        "install the package where there is an nvcc (ORZ_CUDA=ON), or set ORZ_BACKEND=triton"
    )


@functools.cache
def library(path: Path | None = None) -> ctypes.CDLL:
    """The library, opened once, with the argument types of orz_cuda.h. Every pointer travels as an address."""
    path = path or find()
    try:
        opened = ctypes.CDLL(str(path))
        found = opened.orz_cuda_interface()
    except (OSError, AttributeError) as error:
        # ImportError, so that `auto` goes on to the next backend: one made for another system opens nowhere else.
        raise ImportError(
            f"{path}: expected a library that opens here, found: {error}; build csrc/cuda again"
        ) from error
    if found != INTERFACE:
        raise ImportError(f"{path}: expected interface {INTERFACE}, found {found}; build csrc/cuda again")
    opened.orz_cuda_error.argtypes, opened.orz_cuda_error.restype = [c_int], c_char_p
    address: list[Any] = [c_void_p]
    number: list[Any] = [c_float]
    outputs = [*address * 5, c_longlong, c_int, c_void_p]
    opened.orz_gae_blocks.argtypes = [c_longlong]
    opened.orz_gae.argtypes = [*address * 8, c_longlong, c_int, *number * 3, c_void_p]
    opened.orz_loss_blocks.argtypes = [c_longlong, c_int]
    opened.orz_ppo_loss.argtypes = [*address * 7, c_int, *number * 4, *outputs]
    opened.orz_value_loss.argtypes = [*address * 5, c_int, *number, *outputs]
    return opened


def _serves(x: Tensor, *others: Tensor | None) -> bool:
    if not x.is_cuda:
        raise ValueError(f"CUDA kernel: expected tensors on a CUDA device, found {x.device}; set ORZ_BACKEND=reference")
    return all(o is None or o.dtype == torch.float32 for o in (x, *others))


def _call(name: str, on: torch.device, *args: Tensor | int | float | None) -> None:
    """Launch on the current stream of the device; tensors become addresses, None becomes null."""
    opened = library()
    with torch.cuda.device(on):
        stream = torch.cuda.current_stream(on).cuda_stream
        plain = (x.data_ptr() if isinstance(x, Tensor) else x for x in args)
        code = getattr(opened, f"orz_{name}")(*plain, stream)
    if code:
        raise RuntimeError(f"orz_{name}: expected a launch on {on}, found: {opened.orz_cuda_error(code).decode()}")


@functools.cache
def _arrivals(device: torch.device, stream: int) -> Tensor:
    """The counter of blocks that are done. A launch leaves it at 0; launches on one stream do not overlap."""
    del stream
    return torch.zeros(1, dtype=torch.int32, device=device)


def gae(
    rewards_N: Tensor, values_N: Tensor, cu_seqlens_B1: Tensor, gamma: float, lam: float,
    mask_N: Tensor | None, bootstrap_B: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not _serves(rewards_N, values_N, bootstrap_B):
        found: tuple[Tensor, Tensor] = triton_gae.gae(
            rewards_N, values_N, cu_seqlens_B1, gamma, lam, mask_N, bootstrap_B
        )
        return found
    num_tokens = len(rewards_N)
    advantages_N, returns_N = torch.empty_like(rewards_N), torch.empty_like(rewards_N)
    aggregates = torch.empty(2 * library().orz_gae_blocks(num_tokens), device=rewards_N.device)
    _call(
        "gae", rewards_N.device, rewards_N, values_N, mask_N, cu_seqlens_B1, bootstrap_B, aggregates, advantages_N,
        returns_N, num_tokens, len(cu_seqlens_B1) - 1, gamma, gamma * lam, gamma * (1 - lam),
    )  # fmt: skip
    return advantages_N, returns_N


def _loss(
    name: str, num_fields: int, inputs: tuple[Tensor | int | float | None, ...], like_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    device, num_tokens, processors = like_N.device, len(like_N), num_processors(like_N)
    blocks = library().orz_loss_blocks(num_tokens, processors)
    loss = torch.empty((), device=device)
    slopes_N = torch.empty_like(like_N)
    stats_F = torch.empty(num_fields, dtype=torch.float64, device=device)
    partials_FP = torch.empty((num_fields, blocks), device=device)
    arrived = _arrivals(device, torch.cuda.current_stream(device).cuda_stream)
    _call(name, device, *inputs, loss, slopes_N, stats_F, partials_FP, arrived, num_tokens, processors)
    return loss, slopes_N, stats_F


def ppo_loss(
    logprobs_N: Tensor, sampled_logprobs_N: Tensor, advantages_N: Tensor, proximal_logprobs_N: Tensor | None,
    entropy_N: Tensor | None, mask_N: Tensor | None, denominator: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None, behaviour_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (logprobs_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N, entropy_N)
    if not _serves(*tensors):
        found: tuple[Tensor, Tensor, Tensor] = triton_ppo_loss.ppo_loss(
            *tensors, mask_N, denominator, clip_low, clip_high, dual_clip, behaviour_cap
        )
        return found
    limits = (1 - clip_low, 1 + clip_high, dual_clip or math.inf, behaviour_cap or math.inf)
    inputs = (*tensors, mask_N, denominator.float(), int(denominator.dim() > 0), *limits)
    return _loss("ppo_loss", len(triton_ppo_loss.FIELDS), inputs, logprobs_N)


def value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, mask_N: Tensor | None, denominator: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (values_N, old_values_N, returns_N)
    if not _serves(*tensors):
        found: tuple[Tensor, Tensor, Tensor] = triton_value_loss.value_loss(*tensors, mask_N, denominator, clip)
        return found
    inputs = (*tensors, mask_N, denominator.float(), int(denominator.dim() > 0), clip or math.inf)
    return _loss("value_loss", len(triton_value_loss.FIELDS), inputs, values_N)
