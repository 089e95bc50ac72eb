"""A Hugging Face causal language model over a slot cache: packed forwards, and weights swapped in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from orz_async.errors import EngineError, ModelError
from orz_async.generator import attention, fused
from orz_async.generator.batch import Work, pack_batch
from orz_async.generator.kv_cache import KVCache
from orz_async.generator.parameters import match_tensors, served_tensors

_NO_CONFIG = (
    "expected a Hugging Face model directory at {path}, found no config.json there; give the directory with --model, "
    "or make the demo's with `orz make-base`"
)

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""Others (chunked, linear, convolution, state space) keep a state that is not in the slot cache."""

_CHECK_TOKENS = 12
_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Of the self-check, relative to the largest logit."""


def load_model(path: str, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A model from a local directory with safetensors. Code in the directory is never run."""
    if not (Path(path) / "config.json").is_file():
        raise ModelError(_NO_CONFIG.format(path=path))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.NAME,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"expected a causal language model at {path}, found: {error}") from error
    model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    return model


def load_shapes(path: str) -> PreTrainedModel:
    """The model of a local directory without its values: names, shapes and ties of its parameters."""
    if not (Path(path) / "config.json").is_file():
        raise ModelError(_NO_CONFIG.format(path=path))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        if (Path(path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"expected a causal language model of transformers in {path}, found: {error}") from error
    return model


class SlotModel:
    """Forward passes of `model` for up to `slots` sequences of up to `max_tokens` tokens."""

    def __init__(self, model: PreTrainedModel, *, slots: int, max_tokens: int) -> None:
        config = model.config.get_text_config()
        foreign = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
        if foreign:
            raise ModelError(
                f"expected layers that are {' or '.join(sorted(_KNOWN_LAYERS))}, found {', '.join(sorted(foreign))}; "
                "use --engine vllm"
            )
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and max_tokens > limit:
            raise ModelError(
                f"prompt and response may have {max_tokens} tokens, the model's positions end at {limit}; lower "
                "sampling.max_new_tokens or data.max_prompt_tokens"
            )
        self.model = model
        self.model.train(False).requires_grad_(False)
        self.model.set_attn_implementation(attention.NAME)
        self.device = model.device
        self.vocab_size = int(config.vocab_size)
        self.cache = KVCache(slots, max_tokens, int(config.num_hidden_layers))
        self._fused = self._fuse()
        self._check_against_plain_forward()

    def forward(self, work: Work) -> Tensor:
        """Logits [rows, V]: the decode rows, then the slots of the prefixes. Keys and values go to the cache."""
        return self._packed(work) if self._fused is None else self._fused.forward(work)

    @torch.inference_mode()
    def _packed(self, work: Work) -> Tensor:
        """`forward` by the model's own code, with attention over the slot cache."""
        batch = pack_batch(work, self.cache, self.device)
        logits_1KV = self.model(
            input_ids=batch.tokens_1N,
            position_ids=batch.positions_1N,
            use_cache=False,
            logits_to_keep=batch.logits_index,
            slot_batch=batch.slots,
        ).logits
        logits_BV: Tensor = logits_1KV[0].index_select(0, batch.logits_rows)
        return logits_BV

    def _fuse(self) -> fused.FusedModel | None:
        return fused.FusedModel(self.model, self.cache) if fused.fits(self.model) else None

    def load(self, tensors: Mapping[str, Tensor]) -> str:
        """Replace every parameter and persistent buffer and return the digest of the result.

        Tied parameters may come under any of their names. A parameter takes over the dtype of its tensor: the learner
        decides what is served. Buffers that are not in the model's files (rotary frequencies) follow from its config.

        Raises EngineError with the tensor's name: before anything changed, if one is missing, unknown, of another
        shape or not finite; after it, if what is served is not what was given. The caller must not serve then.
        """
        from orz_async.weights.snapshot import digest_of, spec_of

        parameters = served_tensors(self.model)
        given = match_tensors(self.model, tensors)
        retyped = False
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.dtype != given[name].dtype:
                    parameter.data, retyped = parameter.data.to(given[name].dtype), True
                parameter.copy_(given[name])
        if retyped:
            self.cache.release()
        specs = [spec_of(name, tensor.detach().cpu().contiguous()) for name, tensor in parameters.items()]
        for spec in specs:
            expected = spec_of(spec.name, given[spec.name].detach().cpu().contiguous())
            if spec != expected:
                raise EngineError(
                    f"tensor {spec.name!r}: expected to serve checksum {expected.checksum:08x} ({expected.dtype}, "
                    f"{list(expected.shape)}), the model holds {spec.checksum:08x} ({spec.dtype}, {list(spec.shape)})"
                )
        self._fused = self._fuse()
        return digest_of(specs)

    def _check_against_plain_forward(self) -> None:
        """Compare a prefill and decode steps with transformers' own attention: proof that this architecture fits."""
        name = type(self.model).__name__
        try:
            found, plain = self._both_ways()
        except TypeError as error:
            raise ModelError(f"{name} does not take what this engine passes ({error}); use --engine vllm") from error
        difference = max(float((one - plain).abs().max() / plain.abs().max().clamp(min=1.0)) for one in found)
        if not difference <= _CHECK_TOLERANCE.get(self.model.dtype, 1e-1):
            raise ModelError(
                f"{name} computes other logits over the slot cache than by itself (relative difference "
                f"{difference:.1e}): its attention is of a kind this engine does not know; use --engine vllm"
            )

    def _both_ways(self) -> tuple[list[Tensor], Tensor]:
        """Logits of the second half of some tokens: over the cache, in each way there is, and by one plain forward."""
        length = min(_CHECK_TOKENS, self.cache.max_tokens)
        tokens = torch.arange(1, length + 1) * 7919 % self.vocab_size
        split = max(length // 2, 1)
        steps = [Work(prefixes=[tokens[:split].numpy()], slots=[0], source=[0])]
        for position in range(split, length):
            last, at = tokens[position : position + 1].numpy(), torch.tensor([position]).numpy()
            steps.append(Work(decode_tokens=last, decode_positions=at))
        ways = [self._packed] if self._fused is None else [self._packed, self._fused.forward]
        found = [torch.cat([way(step) for step in steps]).float() for way in ways]
        self.model.set_attn_implementation("eager")
        with torch.inference_mode():
            plain = self.model(input_ids=tokens[None].to(self.device), use_cache=False).logits[0, split - 1 :].float()
        self.model.set_attn_implementation(attention.NAME)
        return found, plain
