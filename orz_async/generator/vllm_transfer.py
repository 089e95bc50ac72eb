"""The worker side of a weight update in vLLM. Imported in vLLM's processes only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from orz_async.generator.vllm_readback import served_checksums
from orz_async.generator.vllm_weights import served_path
from orz_async.weights.snapshot import tensor_bytes, tensor_checksum


@dataclass
class FileInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One complete version."""

    path: str
    """A safetensors file that each worker of the engine can read, with the names of the Hugging Face model."""
    checksums: dict[str, int] = field(default_factory=dict)
    """CRC-32C of each tensor's bytes. These names, no more and no fewer, are what must be in the file."""


class FileTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):  # type: ignore[misc]
    """Loads a version from a file in memory. It raises, and the engine then must not go on, unless all of it arrived.

    The layers are loaded as when the model was: a backend that packs weights (CPU does) packs the new ones.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to do: there is no connection."""

    def start_weight_update(self) -> None:
        # Before the layers are taken apart: then parameters that are tied still count once.
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        self._update = update_info
        loaded = self.model.load_weights(_verified(update_info))
        if loaded is not None and (missing := sorted(self._expected - loaded)):
            raise RuntimeError(
                f"{len(missing)} of {len(self._expected)} parameters got no weights, first {missing[0]!r}"
            )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            # A head tied to the embedding is loaded as the embedding, so the reload passes it by; where it keeps a
            # packed copy of its own (on CPU), that copy would go on serving the old weights.
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
        self._tell_served()

    def _tell_served(self) -> None:
        """Lay what this worker serves now beside the file, for the daemon to compare before anything is sampled."""
        from safetensors import safe_open

        with safe_open(self._update.path, framework="pt") as file:
            sent = {name: file.get_tensor(name) for name in self._update.checksums}
        packed = getattr(self.model, "packed_modules_mapping", {})
        found = served_checksums(self.model, sent, self._update.checksums, packed)
        served_path(self._update.path, os.getpid()).write_text(json.dumps(found))

    def shutdown(self) -> None:
        """Nothing is held."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: object) -> None:
        """vLLM 0.27 asks for the sender's side as well, and never calls it: here that is the daemon's `WeightFile`."""
        raise NotImplementedError("weights are laid into a file by the daemon")


def _verified(info: FileUpdateInfo) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file, once its bytes have been checked."""
    from safetensors import safe_open

    with safe_open(info.path, framework="pt") as file:
        names = set(file.keys())
        if names != info.checksums.keys():
            different = sorted(names ^ info.checksums.keys())
            raise RuntimeError(
                f"expected {len(info.checksums)} tensors, found {len(names)}, among them {different[0]!r}"
            )
        for name, expected in info.checksums.items():
            tensor = file.get_tensor(name)
            found = tensor_checksum(tensor_bytes(tensor))
            if found != expected:
                raise RuntimeError(f"tensor {name!r}: expected checksum {expected:08x}, found {found:08x}")
            yield name, tensor
