"""whiten over ranks: two gloo processes against the whole in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_ranks_whiten_over_all_of_their_tokens(tmp_path: Path) -> None:
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from orz_async import ops\n"
        "rank, store = int(sys.argv[1]), sys.argv[2]\n"
        "dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)\n"
        "torch.manual_seed(0)\n"
        "x = torch.randn(100) * 3 + 1\n"
        "mine = x[:30].clone() if rank == 0 else x[30:].clone()\n"
        "want = ops.whiten(x)[:30] if rank == 0 else ops.whiten(x)[30:]\n"
        "found = ops.whiten(mine, group=dist.group.WORLD)\n"
        "torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)\n"
        "both = [torch.empty(3, dtype=torch.float64) for _ in range(2)]\n"
        "dist.all_gather(both, ops.moments(mine))\n"
        "assert torch.equal(found, ops.whiten(mine, over=ops.merge_moments(both)))\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "store")], stderr=subprocess.PIPE) for r in (0, 1)]
    for process in ranks:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
