"""The services, each behind the two calls of `Writer`. Their packages are extras: imported where they are used."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orz_async.config import Config, loopback_port
from orz_async.observe.sinks.feed import Writer
from orz_async.observe.sinks.scalars import Point


class TensorBoard:
    """Event files in RUN/tensorboard, by TensorBoard's own writer: torch is not needed."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer: Any = EventFileWriter(str(folder))

    def write(self, point: Point) -> None:
        import time

        values = [self._summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
        event = self._event(wall_time=time.time(), step=point.step, summary=self._summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, project: str, run_dir: Path, run_id: str, settings: dict[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            config=settings,
            id=run_id,
            resume="allow",
        )

    def write(self, point: Point) -> None:
        # Not wandb's own step, which must never go back: evaluations arrive after later steps.
        self._run.log(point.values | {"step": point.step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    def __init__(self, project: str, run_dir: Path, run_id: str, settings: dict[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        # It knows runs by name alone, and folders of one name are not one run.
        name = f"{run_dir.name}-{run_id[:6]}"
        trackio.init(project=project, name=name, config=settings, resume="allow")

    def write(self, point: Point) -> None:
        self._trackio.log(point.values | {"step": point.step})

    def close(self) -> None:
        self._trackio.finish()


class Prometheus:
    """The last value of each number at http://127.0.0.1:PORT/metrics."""

    def __init__(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        self._gauge, self._registry = Gauge, CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=self._registry)

    def write(self, point: Point) -> None:
        for name, value in (point.values | {"step": float(point.step)}).items():
            metric = "orz_" + re.sub(r"\W", "_", name)
            if metric not in self._gauges:
                self._gauges[metric] = self._gauge(metric, name, registry=self._registry)
            self._gauges[metric].set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _kept_id(run_dir: Path) -> str:
    """A name of its own for every run folder, so that a run which is continued goes on in the same curves."""
    file = run_dir / "sinks.id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex, encoding="ascii")
    return file.read_text(encoding="ascii").strip()


def configured(config: Config, run_dir: Path) -> dict[str, Callable[[], Writer]]:
    """What [observe] asks for: name of the sink -> how to open it."""
    import dataclasses

    observe, settings = config.observe, dataclasses.asdict(config)
    makers: dict[str, Callable[[], Writer]] = {}
    run_id = _kept_id(run_dir) if observe.wandb or observe.trackio else ""
    if observe.tensorboard:
        makers["tensorboard"] = lambda: TensorBoard(run_dir / "tensorboard")
    if observe.wandb:
        makers["wandb"] = lambda: WandB(observe.wandb, run_dir, run_id, settings)
    if observe.trackio:
        makers["trackio"] = lambda: Trackio(observe.trackio, run_dir, run_id, settings)
    if observe.prometheus:
        makers["prometheus"] = lambda: Prometheus(loopback_port(observe.prometheus))
    return makers
