"""Ranks: messages from rank 0 to the others, sums in a fixed order, sharding. One rank needs no process group at all.

Rank 0 alone talks to the outside. The others wait for its next message; while it waits for rollouts, a thread sends
them keepalives, so that a long wait there never looks like a lost peer here. Messages are bytes in uint8 tensors:
torch's object collectives unpickle what arrives, and are not used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from orz_async.errors import ConfigError, OutOfMemoryError, PeerLostError
from orz_async.learner.loading import materialise

KEEPALIVE = 0
"""Message kind that `receive` passes over; users number theirs from 1."""

_MAX_MESSAGE_BYTES = 1 << 36
_OUT_OF_MEMORY = "orz_async/out of memory"
"""Key in the store of the process group, which torchrun keeps: it outlives a rank."""
KEEPALIVE_PERIOD_S = 5.0
TIMEOUT_S = 600.0
"""Of any collective: far above a keepalive period and a checkpoint, so that it only ends a wait for a dead rank."""


class Message(NamedTuple):
    kind: int
    payload: bytes


@contextmanager
def _peers(rank: int, what: str) -> Iterator[None]:
    """A collective that fails or times out (TIMEOUT_S) is a lost peer, said so."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed raises nothing narrower when a peer is gone
        raise PeerLostError(
            f"rank {rank} expected every rank to {what} within {TIMEOUT_S:g} s, found one gone: {error}"
        ) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    """A peer that is gone, as FSDP2's own collectives tell it: they raise what torch.distributed raises, as it is."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


class World:
    """This process among the ranks of one learner. Methods that say "all ranks" are called by all in the same order."""

    def __init__(self, rank: int, size: int, device: torch.device, control: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._control = control
        """gloo, for messages and host tensors; None without a process group."""

    @classmethod
    def single(cls) -> World:
        return cls(0, 1, torch.device("cpu"), None)

    @classmethod
    def start(cls, *, need_group: bool = False, timeout_s: float = TIMEOUT_S) -> World:
        """From torchrun's environment; NCCL where every rank has a GPU, gloo otherwise."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > local_rank
        device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        if size == 1 and not need_group:
            return cls(0, 1, device, None)
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if on_gpu else "gloo"
        if size == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
        return cls(rank, size, device, dist.new_group(backend="gloo", timeout=timeout))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self._control is not None:
            self._control = None
            dist.destroy_process_group()

    def announce(self, why: str) -> None:
        """Any rank, before it ends because it is out of memory: the others are in a collective that it leaves, and find
        this note when that fails."""
        if self.size > 1:
            _get_default_store().set(_OUT_OF_MEMORY, f"rank {self.rank}: {why}")

    @contextmanager
    def told(self) -> Iterator[None]:
        """All ranks, around work with collectives of torch's own: one that fails is what a rank announced, or a lost
        peer. Any other error passes as it is."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.size == 1 or not _is_of_a_collective(error):
                raise
            if why := self._announced():
                raise OutOfMemoryError(why) from error
            raise PeerLostError(
                f"rank {self.rank} expected every rank to live through a step, found one gone: {error}; its log says "
                "why it ended. The last checkpoint and the journal are whole: the same command goes on from there"
            ) from error

    def _announced(self) -> str:
        store = _get_default_store()
        try:
            return str(store.get(_OUT_OF_MEMORY).decode()) if store.check([_OUT_OF_MEMORY]) else ""
        except RuntimeError:  # the store was in the process that is gone
            return ""

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Rank 0: give every other rank one message."""
        if self.size == 1:
            return
        with _peers(self.rank, "take a message"):
            dist.broadcast(torch.tensor([kind, len(payload)]), src=0, group=self._control)
            if payload:
                # bytearray: torch warns about memory that is read-only, and copies nothing here either.
                dist.broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8), src=0, group=self._control)

    def receive(self) -> Message:
        """Other ranks: the next message, however long rank 0 waits before it sends one."""
        while True:
            with _peers(self.rank, "hear a message of rank 0"):
                message = self._receive()
            if message.kind != KEEPALIVE:
                return message

    def _receive(self) -> Message:
        header = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(header, src=0, group=self._control)
        kind, size = header.tolist()
        assert 0 <= size <= _MAX_MESSAGE_BYTES, f"message of {size} bytes"
        payload = torch.empty(size, dtype=torch.uint8)
        if size:
            dist.broadcast(payload, src=0, group=self._control)
        return Message(kind, payload.numpy().tobytes())

    @contextmanager
    def keepalive(self, period_s: float = KEEPALIVE_PERIOD_S) -> Iterator[None]:
        """Rank 0: while the block waits for something outside, tell the others that it lives."""
        if self.size == 1:
            yield
            return
        done = threading.Event()
        lost: list[PeerLostError] = []

        def tell() -> None:
            while not done.wait(period_s):
                try:
                    self.send(KEEPALIVE)
                except PeerLostError as error:
                    lost.append(error)
                    return

        thread = threading.Thread(target=tell, name="keepalive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if lost:
            raise PeerLostError(f"expected {self.size - 1} other learner ranks to live, lost one: {lost[0]}") from lost[
                0
            ]

    def sum(self, tensor: Tensor) -> Tensor:
        """All ranks: the sum over ranks, in place and equal on every rank."""
        if self.size > 1:
            with _peers(self.rank, "add its part of a sum"):
                dist.all_reduce(tensor, group=self._control if tensor.device.type == "cpu" else None)
        return tensor

    def gather(self, vector: Tensor) -> list[Tensor]:
        """All ranks: everybody's host vector in rank order; the vectors have equal sizes."""
        if self.size == 1:
            return [vector]
        rows = [torch.empty_like(vector) for _ in range(self.size)]
        with _peers(self.rank, "give its part of a vector"):
            dist.all_gather(rows, vector, group=self._control)
        return rows

    def shards(self, tensor: Tensor) -> Iterator[Tensor]:
        """All ranks, exhausting it: rank 0 gets the parts of a sharded tensor in the order of their rows, one at a time
        and on its own device; the others get nothing, and hold nothing more. Of any other tensor rank 0 gets it."""
        if not isinstance(tensor, DTensor):
            if self.is_first:
                yield tensor
            return
        local = tensor.to_local()
        if self.is_first:
            yield local
        assert tensor.placements[-1] == Shard(0), "FSDP2 shards the first dimension"
        # The copy of the weights that rank 0 belongs to; its ranks hold equal numbers of rows, but for the last ones.
        copy = tensor.device_mesh.mesh.reshape(-1, tensor.device_mesh.mesh.shape[-1])[0].tolist()
        total, most = tensor.shape[0], -(-tensor.shape[0] // len(copy))
        group = self._control if local.device.type == "cpu" else None
        for place, rank in enumerate(copy):
            rows = min(most, total - place * most)
            if rank == 0 or rows <= 0:
                continue
            if rank == self.rank:
                with _peers(self.rank, "take its shard"):
                    dist.send(local.contiguous(), dst=0, group=group)
            elif self.is_first:
                part = local.new_empty(rows, *tensor.shape[1:])
                with _peers(self.rank, "give its shard"):
                    dist.recv(part, src=rank, group=group)
                yield part
                del part  # before the next one is given memory

    def shard(
        self, module: nn.Module, layers: nn.ModuleList, *, dtype: torch.dtype, ranks: int = 0, recompute: bool = False
    ) -> None:
        """Move to the device, giving memory to what is on meta; with several ranks or bfloat16, FSDP2 by layer.

        The parameters stay float32 shards; forward and backward run in `dtype`, gradients are reduced in float32.
        Gradients are summed, not averaged: the losses are already divided by counts over all ranks. `ranks` > 0 shards
        over that many neighbouring ranks and replicates over the groups. `recompute`: a layer keeps only its input, and
        is computed again when its gradient is wanted.
        """
        if recompute:
            for layer in layers:
                # Within the module's call, so that FSDP2 has gathered its weights both times.
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if self.size == 1 and dtype == torch.float32:
            materialise(module, self.device)
            return
        mesh = self._mesh(ranks)
        # float32 casts nothing, so that models in float64 (the tests' oracle) are sharded too.
        cast = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False) if dtype == torch.float32 else cast
        on_meta = any(p.is_meta for p in module.parameters())
        if not on_meta:
            module.to(self.device)
        for part in [*layers, module]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        if on_meta:
            materialise(module, self.device)

    def _mesh(self, ranks: int) -> DeviceMesh:
        if ranks in (0, self.size):
            return init_device_mesh(self.device.type, (self.size,))
        if self.size % ranks:
            raise ConfigError(
                f"expected learner.shard_ranks to divide the {self.size} ranks of the learner, found {ranks}; set "
                "it to the GPUs of one node, or to 0 to shard over all ranks"
            )
        return init_device_mesh(self.device.type, (self.size // ranks, ranks), mesh_dim_names=("replicate", "shard"))


def full_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All ranks, exhausting it: every parameter whole, one after the other, under its Hugging Face name.

    A tied parameter appears once. Without sharding these are the parameters themselves, not copies.
    """
    for name, parameter in module.named_parameters():
        yield name, full_tensor(parameter.detach())


def full_state(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All ranks, exhausting it: what an engine needs, the parameters and the buffers that a model's files hold.

    dtype: in which the learner computes. Its float32 master weights are rounded to it in every forward pass, and an
    engine that is given them rounded computes the same; and after a small step most rounded words are what they were.
    """
    persistent = module.state_dict().keys()
    buffers = ((name, full_tensor(one.detach())) for name, one in module.named_buffers() if name in persistent)
    for name, tensor in chain(full_parameters(module), buffers):
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All ranks: the whole of a sharded tensor; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, reference: Tensor) -> Tensor:
    """`full` laid out as `reference` is. Every rank holds all of `full`, so nothing is sent."""
    if isinstance(reference, DTensor):
        mesh: DeviceMesh = reference.device_mesh
        moved = full.to(device=mesh.device_type, dtype=reference.dtype)
        return distribute_tensor(moved, mesh, reference.placements, src_data_rank=None)
    return full.to(device=reference.device, dtype=reference.dtype)
