"""Versions on tokens, for a vLLM (0.27 to 0.31) whose engine knows the version of its weights but does not tell it.

From 0.32 on every batch of outputs carries it. Before, the process that samples puts it on each output here, where 0.32
does: after the step that sampled, while the version can change only in a pause. So the label is the engine's own there
too; none is made up on this side of the wire.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from orz_async.records import Span

_KEY = "orz-weight-version"
"""Among the trace headers of an output, the only field that takes a word more; nobody reads them without tracing."""


def tells_versions() -> bool:
    """Whether this vLLM carries the version of the weights with its outputs."""
    from vllm.v1.engine import EngineCoreOutputs

    return "weight_version" in EngineCoreOutputs.__struct_fields__


def label_outputs() -> None:
    """In the process that samples, from then on, each output carries the version. Elsewhere nothing happens."""
    core = sys.modules.get("vllm.v1.engine.core")  # there before plugins are loaded, in the process that samples
    if core is None or tells_versions():
        return
    for name in ("step", "step_with_batch_queue"):
        step = getattr(core.EngineCore, name)
        if not hasattr(step, "labels_outputs"):
            setattr(core.EngineCore, name, _labelled(step))


def _labelled(step: Callable[[Any], tuple[Any, bool]]) -> Callable[[Any], tuple[Any, bool]]:
    @functools.wraps(step)
    def labelled(engine: Any) -> tuple[Any, bool]:
        batches, executed = step(engine)
        label = {_KEY: engine._weight_version}
        for batch in (batches or {}).values():
            for output in batch.outputs:
                output.trace_headers = label
        return batches, executed

    labelled.labels_outputs = True  # type: ignore[attr-defined]
    return labelled


class Labels:
    """Versions of the tokens of running requests, read where outputs arrive."""

    def __init__(self, llm: Any) -> None:
        """`llm`: an `AsyncLLM` that has no request yet."""
        self._spans: dict[str, list[Span]] = {}
        self._reads = not tells_versions()
        if self._reads:
            self._processor = llm.output_processor
            self._process = self._processor.process_outputs
            self._processor.process_outputs = self._read

    def _read(self, outputs: list[Any], *arguments: Any) -> Any:
        for output in outputs:
            state = self._processor.request_states.get(output.request_id)
            version = (output.trace_headers or {}).get(_KEY)
            if state is None or version is None or not output.new_token_ids:
                continue
            spans = self._spans.setdefault(state.external_req_id, [])
            if not spans or spans[-1].version != int(version):
                spans.append(Span(int(version), state.detokenizer.num_output_tokens()))
        return self._process(outputs, *arguments)

    def of(self, request: str, output: Any) -> tuple[Span, ...]:
        """Of the tokens of a request, from its last `CompletionOutput`; () if the engine gave no label."""
        if self._reads:
            return tuple(self._spans.get(request, ()))
        return tuple(Span(int(span.version), span.start) for span in output.weight_versions or ())

    def forget(self, request: str) -> None:
        """It has ended."""
        self._spans.pop(request, None)
