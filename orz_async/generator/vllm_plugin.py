"""What this package adds to the processes of vLLM, which load it by its entry point in `vllm.general_plugins`.

A weight transfer backend, "orz": the daemon lays a version into a file in memory, and each worker takes its part of it.
Worker processes also end with the process that started them, however that ends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

from orz_async.generator.vllm_labels import label_outputs

BACKEND = "orz"

_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Called once or more in every process of vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    if BACKEND not in Factory._registry:
        Factory.register_engine(BACKEND, "orz_async.generator.vllm_transfer", "FileTransferEngine")
    label_outputs()
    _end_with_parent()


def _end_with_parent() -> None:
    """A daemon that is killed cannot say goodbye, and a process of an engine left behind keeps memory and cores."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)
