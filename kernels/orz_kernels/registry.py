"""Every public function is a torch.library op `orz_kernels::<name>`, so that torch.compile keeps it whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "orz_kernels"


def register(function: Callable[..., Any]) -> Any:
    """A functional op; its shape rule follows by `.register_fake`. Autograd stays with the caller."""
    return torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", function, mutates_args=())
