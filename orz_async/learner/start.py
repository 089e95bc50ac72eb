"""From a configuration to a running loop: opens all in order, resumes if there is something, closes in reverse."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from orz_async.broker.server import Broker, ResumePoint
from orz_async.config import Config
from orz_async.config_toml import to_toml
from orz_async.data.source import build
from orz_async.data.tokenizer import load_tokenizer
from orz_async.errors import OrzError
from orz_async.keys.ring import weights_keys
from orz_async.learner import checkpoint
from orz_async.learner.audit import Auditor
from orz_async.learner.compatibility import changes
from orz_async.learner.durable import Identity, begin_epoch, lock, replace_file
from orz_async.learner.follower import Command, follow
from orz_async.learner.hf_directory import check_tokenizer, inspect
from orz_async.learner.loop import Learner
from orz_async.learner.model import load_models, meta_models
from orz_async.learner.parallel import World
from orz_async.learner.services import Services
from orz_async.learner.signals import Stop
from orz_async.learner.trainer import Trainer
from orz_async.observe.events import EventLog, Timeline
from orz_async.observe.sinks.process import sinks
from orz_async.observe.tokens import TokenLog
from orz_async.observe.versions import versions
from orz_async.weights.protocol import Publisher
from orz_async.weights.transport import bind_of, serve

log = logging.getLogger(__name__)


Outside = Callable[[Config, Trainer, Identity, EventLog, ResumePoint | None], AbstractContextManager[tuple[Any, Any]]]
"""What the loop talks to, as a context: its rollouts and its weights (`services.py`)."""


def start(config: Config, outside: Outside | None = None) -> None:
    """One rank of a run, from start or checkpoint to its end. All ranks see the same run_dir and model.path.

    `outside` replaces broker and weight stream: `replay.py` gives the batches of a journal.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(config.learner.threads)
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop().installed())
        world = World.start(need_group=config.model.dtype != "float32")
        stack.callback(world.close)
        if world.is_first:
            stack.enter_context(lock(checkpoint.folder(run_dir)))
        events = EventLog(run_dir / "events" / f"learner-{world.rank}.jsonl", f"learner-{world.rank}")
        stack.callback(events.close)
        timeline = Timeline(events, f"learner-{world.rank}")
        timeline.start()
        stack.callback(timeline.close)
        if world.is_first:
            _lead(config, world, stop, events, timeline, outside or _outside)
        else:
            _follow(config, world, timeline)


def _lead(config: Config, world: World, stop: Stop, events: EventLog, timeline: Timeline, outside: Outside) -> None:
    """Rank 0: the broker, the weights and the decisions."""
    run_dir = Path(config.run_dir)
    found = checkpoint.find(run_dir)
    notes = [] if found is None else [*found.damaged, *changes(found, config)]
    _describe(run_dir, config)
    identity = begin_epoch(checkpoint.folder(run_dir))
    world.send(Command.RESUME, b"" if found is None else found.path.name.encode())
    trainer, auditor = _trainer(config, world, None if found is None else found.path)
    for note in notes:
        log.warning("resuming: %s", note)
    events.emit(
        "run",
        run_id=identity.run_id,
        resumed_step=trainer.num_steps if found else None,
        epoch=identity.epoch,
        notes=notes,
        # What `orz verify` holds the run to.
        ledger={
            "rollouts_per_step": config.broker.rollouts_per_step,
            "max_lag": config.broker.max_lag,
            "window": config.broker.window,
            "steps": config.steps,
        },
    )
    start = None if found is None else ResumePoint(found.ledger(), trainer.num_steps, checkpoint.older_ledgers(found))
    assert auditor is not None
    with (
        sinks(config.observe, run_dir, events),
        outside(config, trainer, identity, events, start) as (rollouts, weights),
        closing(TokenLog(run_dir / "tokens", identity.epoch)) as tokens,
    ):
        services = Services(run_dir, identity, rollouts, weights, events, timeline, stop, tokens)
        Learner(config, trainer, auditor, services).run()


def _follow(config: Config, world: World, timeline: Timeline) -> None:
    run_dir = Path(config.run_dir)
    kind, payload = world.receive()
    assert kind == Command.RESUME
    trainer, _ = _trainer(config, world, checkpoint.folder(run_dir) / payload.decode() if payload else None)
    follow(trainer, timeline, run_dir=run_dir)


def _trainer(config: Config, world: World, resume: Path | None) -> tuple[Trainer, Auditor | None]:
    """All ranks: the base model, or what the checkpoint made of it."""
    torch.manual_seed(config.seed)
    directory = inspect(config.model.path)
    with_critic = config.learner.estimator == "gae"
    policy, critic = meta_models(directory, seed=config.seed, with_critic=with_critic)
    auditor = Auditor(config, policy, world.device) if world.is_first else None
    trainer = Trainer(config, policy, critic, world)
    if resume is None:
        load_models(policy, critic, directory)
    else:
        checkpoint.restore(trainer, resume)
    return trainer, auditor


@contextmanager
def _outside(
    config: Config, trainer: Trainer, identity: Identity, events: EventLog, start: ResumePoint | None
) -> Iterator[tuple[Broker, Publisher]]:
    """What generators talk to; at the end they are told whether the run is complete, and if not, why."""
    tokenizer = load_tokenizer(config.model.path)
    vocab_size = int(trainer.policy.config.vocab_size)
    check_tokenizer(config.model.path, tokenizer_size=len(tokenizer), vocab_size=vocab_size)
    prompts, heldout = build(config.data, tokenizer, config.seed)
    broker_events = EventLog(Path(config.run_dir) / "events" / "broker.jsonl", "broker")
    bind = bind_of(config.weights, broker_bind=config.broker.bind, run_dir=Path(config.run_dir))
    device = str(trainer.world.device)
    publisher = serve(
        bind, identity.epoch, events, keys=weights_keys(config.broker.keys), settings=config.weights, device=device
    )
    finished, reason = False, "the learner failed"
    try:
        broker = Broker(
            config=config,
            run_dir=Path(config.run_dir),
            run_id=identity.run_id,
            epoch=identity.epoch,
            prompts=prompts,
            heldout=heldout,
            weights_address=publisher.address,
            model_path=str(Path(config.model.path).absolute()),
            vocab_size=vocab_size,
            events=broker_events,
            start=start,
        )
        broker.start()
        try:
            replace_file(Path(config.run_dir) / "address", broker.address.encode())
            yield broker, publisher
            finished, reason = True, "the run is complete"
        except OrzError as error:
            reason = str(error)
            raise
        finally:
            broker.close(finished, reason)
    finally:
        publisher.close()
        broker_events.close()


def _describe(run_dir: Path, config: Config) -> None:
    """What the launcher writes too: a learner started by hand leaves the same folder behind."""
    replace_file(run_dir / "config.toml", to_toml(config).encode())
    replace_file(run_dir / "versions.json", json.dumps(versions(), indent=2).encode() + b"\n")
