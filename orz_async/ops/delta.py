"""Lossless coding of a tensor against its previous version; the layout is in `orz_async.ops.reference.delta`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orz_async.ops import backend, checks

_WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _words(argument: str, x: Tensor) -> Any:
    """A numpy view of the bits, unsigned."""
    view = x.detach().reshape(-1).view(_WORDS[x.dtype]).numpy()
    return view.view("u4" if view.itemsize == 4 else "u2")


def delta_encode(new: Tensor, old: Tensor, *, threads: int | None = None) -> bytes:
    """What turns `old` into `new`, bit for bit: the changed words, or all of them where that is not longer.

    float32, bfloat16 or float16 in host memory. `threads` (default: torch's) changes the time, never the bytes.
    """
    checks.tensor("new", new, [None] * new.dim() if isinstance(new, Tensor) else [], tuple(_WORDS))
    checks.tensor("old", old, list(new.shape), [new.dtype], like=new)
    checks.require(new.device.type == "cpu", "new", "a tensor in host memory", new.device)
    threads = torch.get_num_threads() if threads is None else threads
    checks.whole("threads", threads, 1)
    payload: bytes = backend.selected().host.delta_encode(_words("new", new), _words("old", old), threads)
    return payload


def delta_apply(tensor: Tensor, payload: bytes, *, threads: int | None = None) -> None:
    """Turn `tensor` in place from the version `payload` was encoded against into the one it encodes.

    Everything is checked first: the payload's checksums, that the tensor is its base, and the checksum of the result.
    If anything is wrong, ValueError, and the tensor is as it was.
    """
    checks.tensor("tensor", tensor, [None] * tensor.dim() if isinstance(tensor, Tensor) else [], tuple(_WORDS))
    checks.require(tensor.device.type == "cpu", "tensor", "a tensor in host memory", tensor.device)
    checks.require(isinstance(payload, bytes | bytearray | memoryview), "payload", "bytes", type(payload).__name__)
    threads = torch.get_num_threads() if threads is None else threads
    checks.whole("threads", threads, 1)
    backend.selected().host.delta_apply(_words("tensor", tensor), bytes(payload), threads)
