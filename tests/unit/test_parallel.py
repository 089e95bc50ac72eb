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
import learner_ranks
import pytest
import torch
from safetensors.torch import load_file

from orz_async.learner.parallel import World

SCRIPT = Path(learner_ranks.__file__)


def start_ranks(folder: Path, size: int) -> list[dict[str, Any]]:
    """Run `size` ranks to their end and give back what each of them wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(SCRIPT.parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    kit.save_model(made / "model")
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What a single rank says, without a process group."""
    return {case: learner_ranks.from_start(case, folder, World.single()) for case in learner_ranks.CASES}


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two ranks says; they also resume what the single one saved."""
    return start_ranks(folder, 2)


@pytest.mark.parametrize("case", learner_ranks.CASES)
def test_two_ranks_equal_one(one: dict[str, Any], two: list[dict[str, Any]], case: str) -> None:
    assert two[0][case] == two[1][case], "ranks disagree with each other"
    torch.testing.assert_close(
        torch.tensor(two[0][case]["told"]), torch.tensor(one[case]["told"]), rtol=1e-5, atol=1e-6
    )
    # Adam turns rounding into a step of the learning rate where a gradient is nearly 0: on a few weights of thousands.
    difference = torch.tensor(two[0][case]["weights"]) - torch.tensor(one[case]["weights"])
    assert difference.abs().quantile(0.99) < 1e-6


def test_two_ranks_export_the_same_files(folder: Path, two: list[dict[str, Any]]) -> None:
    for exported in ("model.safetensors", "critic/model.safetensors"):
        a, b = (load_file(folder / f"uneven-export{size}" / exported) for size in (1, 2))
        assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in b.items()}


def test_any_number_of_ranks_resumes(folder: Path, two: list[dict[str, Any]]) -> None:
    want = torch.tensor(learner_ranks.resumed("uneven", folder, World.single(), 1)["told"])
    found = [learner_ranks.resumed("uneven", folder, World.single(), 2), *(two[0][f"resumed from {n}"] for n in (1, 2))]
    for other in found:
        torch.testing.assert_close(torch.tensor(other["told"]), want, rtol=1e-4, atol=1e-5)


def test_a_long_wait_of_rank_0_trips_no_timeout(two: list[dict[str, Any]]) -> None:
    assert two[1]["messages"] == {"waited": True, "kinds": [3, 4], "payloads": [True, True]}
