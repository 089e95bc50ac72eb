"""A learner without a model, to be killed: python broker_victim.py RUN_DIR PORT. Notes every batch it takes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import time
from pathlib import Path

import msgspec
from broker_fakes import make_broker, small_config

from orz_async.broker.server import ResumePoint

STEPS = 40


def main(run_dir: Path, port: int) -> None:
    config = small_config(max_lag=2, window=1, bind=f"tcp://127.0.0.1:{port}")
    config = dataclasses.replace(config, steps=STEPS)
    saved = sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    start = ResumePoint(saved[-1].read_bytes(), int(saved[-1].name.split("-")[1])) if saved else None
    epoch = len(list(run_dir.glob("epoch-*"))) + 1
    (run_dir / f"epoch-{epoch}").touch()
    broker = make_broker(run_dir, config, epoch=epoch, start=start)
    broker.start()
    version = start.version if start else 0
    broker.published(version)
    notes = os.open(run_dir / "taken", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while version < STEPS:
        batch = broker.take(version)
        digest = hashlib.sha256(msgspec.msgpack.encode(batch)).hexdigest()
        numbers = ",".join(str(t.rollout) for t in batch)
        os.write(notes, f"{version} {numbers} {version - min(t.version_first for t in batch)} {digest}\n".encode())
        time.sleep(0.02)
        version += 1
        broker.published(version)
        if version % 3 == 0:
            part = run_dir / "part"
            part.write_bytes(broker.snapshot())
            part.rename(run_dir / f"checkpoint-{version}")
            broker.checkpointed(version)
    (run_dir / "funnel").write_bytes(msgspec.json.encode(broker.funnel()))
    broker.close(finished=True, reason="done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
