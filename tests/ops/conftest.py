from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from orz_async.ops import backend


@pytest.fixture(params=["reference", "cpu"])
def ops_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each backend that serves host memory."""
    with backend.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
