"""A daemon that is killed takes the processes of its engine with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]

DAEMON = """
import multiprocessing, time
from orz_async.generator.vllm_plugin import _end_with_parent

def worker(queue):
    _end_with_parent()
    queue.put(True)
    time.sleep(300)

context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=worker, args=(queue,))
child.start()
queue.get()
print(child.pid, flush=True)
time.sleep(300)
"""


def test_workers_end_with_a_killed_daemon() -> None:
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    worker = psutil.Process(int(daemon.stdout.readline()))
    try:
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait(60)
        deadline = time.monotonic() + 60
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the worker outlived its daemon"
            time.sleep(0.05)
    finally:
        daemon.stdout.close()
        if worker.is_running():
            worker.kill()
