"""What is read again of a loaded model, with the layers as vLLM has them, without vLLM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orz_async.generator.vllm_readback import served_checksums
from orz_async.weights.snapshot import tensor_bytes, tensor_checksum

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Layer(nn.Module):
    """One layer as it serves: fused, a vocabulary padded to 8 rows, and one linear layer packed out of sight."""

    def __init__(self, sent: dict[str, Tensor]) -> None:
        super().__init__()
        self.embed, self.qkv_proj, self.down_proj, self.norm = (nn.Module() for _ in range(4))
        self.embed.weight = nn.Parameter(torch.cat([sent["0.embed.weight"], torch.zeros(3, 4)]))
        parts = [sent[f"0.{part}.weight"] for part in PACKED["qkv_proj"]]
        self.qkv_proj.weight = nn.Parameter(torch.cat(parts))
        self.down_proj.weight = nn.Parameter(torch.empty(0))
        self.norm.weight = nn.Parameter(sent["0.norm.weight"].clone())
        self.register_buffer("scale", sent["0.scale"].clone())


def build() -> tuple[nn.Module, dict[str, Tensor], dict[str, int]]:
    torch.manual_seed(0)
    shapes = {"embed": (5, 4), "q_proj": (4, 4), "k_proj": (2, 4), "v_proj": (2, 4), "down_proj": (4, 6), "norm": (4,)}
    sent = {f"0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()} | {"0.scale": torch.tensor(2.0)}
    return (
        nn.ModuleList([Layer(sent)]),
        sent,
        {name: tensor_checksum(tensor_bytes(one)) for name, one in sent.items()},
    )


def test_what_serves_as_it_was_sent_has_its_checksum_and_what_is_packed_none() -> None:
    model, sent, checksums = build()
    served = served_checksums(model, sent, checksums, PACKED)
    assert served == {name: value for name, value in checksums.items() if name != "0.down_proj.weight"}
    assert not served_checksums(model.double(), sent, checksums, PACKED)  # of another kind: nothing to compare


def test_one_flipped_bit_changes_the_checksum_of_its_tensor_alone() -> None:
    where = {"0.embed.weight": ("embed", 4), "0.k_proj.weight": ("qkv_proj", 5), "0.v_proj.weight": ("qkv_proj", 7)}
    for name, (layer, row) in where.items():
        model, sent, checksums = build()
        weight = getattr(model[0], layer).weight  # type: ignore[index]
        weight.data[row].view(torch.int32)[1] ^= 1
        served = served_checksums(model, sent, checksums, PACKED)
        assert {one for one in served if served[one] != checksums[one]} == {name}
        start = {"0.embed.weight": 0, "0.k_proj.weight": 4, "0.v_proj.weight": 6}[name]
        assert served[name] == tensor_checksum(tensor_bytes(weight.detach()[start : start + len(sent[name])]))
