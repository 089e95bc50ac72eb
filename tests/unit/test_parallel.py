"""Several gloo ranks do what one does, messages outlive long waits, and any number of ranks resumes a checkpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import learner_kit as kit
import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("learner_ranks.py")


def ranks(case: str, folder: Path, size: int) -> list[dict[str, Any]]:
    """Run `size` ranks to their end and give back what each of them wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), case, str(folder)],
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(SCRIPT.parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [json.loads((folder / f"{case}-{size}-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    kit.save_model(made / "model")
    return made


@pytest.mark.parametrize("case", ["uneven", "sequence", "nothing"])
def test_two_ranks_equal_one(folder: Path, case: str) -> None:
    [one] = ranks(case, folder, 1)
    both = ranks(case, folder, 2)
    assert both[0] == both[1], "ranks disagree with each other"
    torch.testing.assert_close(torch.tensor(both[0]["told"]), torch.tensor(one["told"]), rtol=1e-5, atol=1e-6)
    # Adam turns rounding into a step of the learning rate where a gradient is nearly 0, on a few weights of thousands.
    weights = torch.tensor(both[0]["weights"]) - torch.tensor(one["weights"])
    assert weights.abs().quantile(0.99) < 1e-6
    if case == "uneven":
        for exported in ("model.safetensors", "critic/model.safetensors"):
            a, b = (load_file(folder / f"export{size}" / exported) for size in (1, 2))
            assert a.keys() == b.keys()
            assert all(a[name].shape == b[name].shape for name in a)


def test_any_number_of_ranks_resumes(folder: Path) -> None:
    for size in (1, 2):
        if not (folder / f"run{size}").exists():
            ranks("uneven", folder, size)
    told = [ranks(f"uneven:{source}", folder, size)[0]["told"] for source, size in ((1, 1), (2, 1), (1, 2), (2, 2))]
    for other in told[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(told[0]), rtol=1e-4, atol=1e-5)


def test_a_long_wait_of_rank_0_trips_no_timeout(folder: Path) -> None:
    _, follower = ranks("messages", folder, 2)
    assert follower == {"kinds": [3, 4], "whole": True, "empty": True}
