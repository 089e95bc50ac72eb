"""How fast the machines are: assumed from a data sheet. What was measured comes from `measured.py`."""

from __future__ import annotations

from dataclasses import dataclass

from orz_async.config import Config
from orz_async.config_toml import nearest
from orz_async.errors import ConfigError
from orz_async.sim.models import EngineModel, LearnerModel
from orz_async.sim.shape import Shape


@dataclass(frozen=True, slots=True)
class Device:
    """Data sheet: dense bfloat16 FLOP/s, bytes/s of its memory, GiB."""

    name: str
    flops: float
    bandwidth: float
    memory: float


DEVICES = {
    "a100": Device("A100 80GB SXM", 312e12, 2.04e12, 80),
    "h100": Device("H100 SXM", 989e12, 3.35e12, 80),
    "h200": Device("H200 SXM", 989e12, 4.8e12, 141),
}

LEARNER_EFFICIENCY = 0.35
"""Of the peak FLOP/s while training."""
PREFILL_EFFICIENCY = 0.5
DECODE_EFFICIENCY = 0.6
"""Of the peak bandwidth while decoding."""
DECODE_OVERHEAD_S = 0.004
"""Of each decode step: launches, sampling, scheduling."""
NETWORK_BYTES_S = 12.5e9
"""100 Gbit/s between learner and generators."""
GATHER_BYTES_S = 25e9
SWAP_BYTES_S = 100e9


@dataclass(frozen=True, slots=True)
class Rates:
    engine: EngineModel
    """Of one engine, on `engine_gpus`."""
    learner: LearnerModel
    """Of the whole learner pool."""
    notes: tuple[str, ...]
    """Where each figure is from."""


def find_device(name: str) -> Device:
    if device := DEVICES.get(name.lower()):
        return device
    raise ConfigError(f"expected --gpu to be one of {', '.join(DEVICES)}, found {name!r}; {nearest(name, DEVICES)}")


def assumed(
    shape: Shape, device: Device, config: Config, *, engine_gpus: int, learner_gpus: int, context: float
) -> Rates:
    """Rooflines with a stated efficiency: decoding is bound by bandwidth, prefill and training by FLOP/s.

    A decode step reads all weights once and the KV of every running sequence, `context` tokens long on average.
    Training is 2 passes' worth of FLOPs forward and 4 backward for each weight and token (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1), and one forward of the critic for the values.
    """
    element = 2 if config.model.dtype == "bfloat16" else 4
    weight_bytes = float(shape.params * element)
    bandwidth = device.bandwidth * DECODE_EFFICIENCY * engine_gpus
    forward = shape.forward_flops(context)
    training = device.flops * LEARNER_EFFICIENCY * learner_gpus
    prefill_s = forward / (device.flops * PREFILL_EFFICIENCY * engine_gpus)
    engine = EngineModel(
        slots=config.generator.slots,
        queue=config.generator.queue,
        step_s=weight_bytes / bandwidth + DECODE_OVERHEAD_S,
        row_s=context * shape.kv_bytes(element) / bandwidth,
        prefill_s=prefill_s,
        swap_s=weight_bytes / engine_gpus / SWAP_BYTES_S,
        fetch_s=weight_bytes / NETWORK_BYTES_S,
        keep_kv=config.generator.keep_kv,
    )
    learner = LearnerModel(
        policy_s=(forward + 3 * forward) / training,
        publish_s=weight_bytes / GATHER_BYTES_S,
        critic_s=3 * forward / training,
        checkpoint_s=0.0,
        checkpoint_every=config.checkpoint.every,
    )
    notes = (
        f"engine     assumed: {device.name} ({engine_gpus} a model), {DECODE_EFFICIENCY:.0%} of its bandwidth, "
        f"{DECODE_OVERHEAD_S * 1e3:g} ms of overhead a decode step, prefill at {PREFILL_EFFICIENCY:.0%} of its FLOP/s",
        f"learner    assumed: {LEARNER_EFFICIENCY:.0%} of the peak FLOP/s, linear in GPUs",
        f"weights    assumed: {NETWORK_BYTES_S / 1e9:g} GB/s to each engine, {GATHER_BYTES_S / 1e9:g} GB/s to gather",
    )
    return Rates(engine, learner, notes)
