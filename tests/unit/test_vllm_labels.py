"""Versions on tokens where vLLM knows them but does not tell: both ends of the wire, against stand-ins for vLLM."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orz_async.generator.vllm_labels import Labels, label_outputs, tells_versions
from orz_async.records import Span


def output(request: str, *tokens: int) -> SimpleNamespace:
    return SimpleNamespace(request_id=request, new_token_ids=list(tokens), trace_headers=None)


class EngineCore:
    """Samples what it is told to, in a process of its own."""

    def __init__(self) -> None:
        self._weight_version = "default"
        self.next: list[SimpleNamespace] = []

    def step(self) -> tuple[dict[int, SimpleNamespace], bool]:
        return {0: SimpleNamespace(outputs=self.next)}, True

    def step_with_batch_queue(self) -> tuple[None, bool]:
        return None, True


class Processor:
    """Counts the tokens of each request, as vLLM's does."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.processed = 0

    def begin(self, request: str) -> None:
        tokens: list[int] = []
        counter = SimpleNamespace(tokens=tokens, num_output_tokens=lambda: len(tokens))
        self.request_states[request] = SimpleNamespace(external_req_id=request[0], detokenizer=counter)

    def process_outputs(self, outputs: list[Any], timestamp: float) -> None:
        for one in outputs:
            self.processed += 1
            if state := self.request_states.get(one.request_id):
                state.detokenizer.tokens += one.new_token_ids


@pytest.fixture(params=[False, True], ids=["silent", "tells"])
def tells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """vLLM before 0.32, and from then on."""
    fields = ("outputs", "weight_version") if request.param else ("outputs",)
    engine, core = ModuleType("vllm.v1.engine"), ModuleType("vllm.v1.engine.core")
    engine.EngineCoreOutputs = SimpleNamespace(__struct_fields__=fields)  # type: ignore[attr-defined]
    core.EngineCore = type("EngineCore", (EngineCore,), dict(vars(EngineCore)))  # type: ignore[attr-defined]
    for name, module in {"vllm": ModuleType("vllm"), "vllm.v1": ModuleType("vllm.v1"), engine.__name__: engine}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, core.__name__, core)
    return bool(request.param)


def test_a_request_over_two_updates_has_the_engines_own_versions(tells: bool) -> None:
    label_outputs()
    label_outputs()  # plugins are loaded more than once
    assert tells_versions() is tells
    core, processor = sys.modules["vllm.v1.engine.core"].EngineCore(), Processor()
    labels = Labels(SimpleNamespace(output_processor=processor))
    for request in ("a-internal", "b-internal"):
        processor.begin(request)
    sampled = {"0": [("a", 1, 2)], "3": [("a", 3), ("b", 4)], "7": [("b",), ("a", 5, 6, 7)]}
    for version, given in sampled.items():
        core._weight_version = version
        core.next = [output(f"{request}-internal", *tokens) for request, *tokens in given] + [output("gone", 1)]
        batches, executed = core.step()
        assert executed
        processor.process_outputs(batches[0].outputs, 1.0)
    assert core.step_with_batch_queue() == (None, True)
    assert processor.processed == 8
    if tells:  # then the last output brings them
        spans = [SimpleNamespace(version="3", start=0, end=4), SimpleNamespace(version="7", start=4, end=6)]
        assert labels.of("a", SimpleNamespace(weight_versions=spans)) == (Span(3, 0), Span(7, 4))
        assert labels.of("a", SimpleNamespace(weight_versions=None)) == ()
        assert all(one.trace_headers is None for one in core.next)
        return
    last = SimpleNamespace()
    assert labels.of("a", last) == (Span(0, 0), Span(3, 2), Span(7, 3))
    assert labels.of("b", last) == (Span(3, 0),)  # its second output had no token
    labels.forget("a")
    assert labels.of("a", last) == () and labels.of("b", last) == (Span(3, 0),)


def test_an_engine_without_labels_has_no_versions(tells: bool) -> None:
    """As where the plugin was not loaded: the lease then fails, it gets no label from here."""
    processor = Processor()
    labels = Labels(SimpleNamespace(output_processor=processor))
    processor.begin("a-internal")
    processor.process_outputs([output("a-internal", 1, 2)], 1.0)
    assert labels.of("a", SimpleNamespace(weight_versions=None)) == ()
