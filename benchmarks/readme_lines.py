"""README's tables, line by line: what is claimed, its figure as a function of the committed results, the command.

A line of a table is one `Line`. A line whose result nobody has committed is left out of "Measured"; a promise stays,
and says that there is no result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import readme_figures as figures
from benchmarks.e2e import SKIP, STEPS
from benchmarks.newest import Absent, Results


class Line(NamedTuple):
    what: str
    figure: Callable[[Results], str]
    how: str


def measured(results: Results) -> str:
    """The table under "Measured", with the machine, and in a line the machine where it was another."""
    usual = f"On two shared cores ({results.device}) with nothing else running, unless a row says otherwise."
    lines = [usual, "", "| what | figure | how |", "|---|---|---|"]
    for line in MEASURED:
        with contextlib.suppress(Absent):
            results.asked.clear()
            lines.append(f"| {line.what} | {line.figure(results)} | {line.how}{_elsewhere(results)} |")
    return "\n".join(lines) + "\n"


def _elsewhere(results: Results) -> str:
    """The machines of the rows that were asked for last, unless it is the usual one."""
    others = sorted(results.asked - {results.device})
    return f" ({'; '.join(others)})" if others else ""


def promises(results: Results) -> str:
    """The table under "Promises, tested", and who was killed for it."""
    lines = ["| promise | shown by | figure |", "|---|---|---|"]
    lines += [f"| {line.what} | {line.how} | {_or_none(line, results)} |" for line in PROMISES]
    with contextlib.suppress(Absent):
        lines += ["", f"Killed were {figures.killed(results)} on two cores."]
    return "\n".join(lines) + "\n"


def _or_none(line: Line, results: Results) -> str:
    try:
        return line.figure(results)
    except Absent:
        return "no result committed"


CPU_OPS = "`python -m benchmarks.run cpu --only cpu_ops`"
VLLM = "`.venv-vllm/bin/python -m benchmarks.vllm_engines --only {}`"
DEMO = "`python -m benchmarks.run demo`"
PROMISE = "`python -m benchmarks.run promises`"
SAME = "the same"

MEASURED = (
    Line("demo, held-out accuracy", lambda r: figures.demo(r, "accuracy", "{:.3f}"), DEMO),
    Line("demo, response length", lambda r: figures.demo(r, "length", "{:.1f}"), SAME),
    Line("demo, log-probs of learner and engine, largest difference", figures.demo_mismatch, SAME),
    Line("demo, time, after installation", figures.demo_time, SAME),
    Line("rollouts/s at S = 0, 1, 2", figures.asynchrony, "`python -m benchmarks.run async`, two turns"),
    Line("learner waits for rollouts at S = 0, 1, 2", figures.learner_waits, "the same runs"),
    Line(
        "part of the limit of overlap reached, one generator and the learner with a core each",
        figures.overlap,
        "`python -m benchmarks.run e2e`",
    ),
    Line("the slower side of it idles", figures.overlap_idle, "the same run"),
    Line("training time to 90 % held-out accuracy, two generators", figures.time_to_accuracy, "the same run"),
    Line(f"rollouts/s of the demo's recipe, steps {SKIP + 1} to {STEPS}", figures.throughput, "the same run"),
    Line(
        "rollouts/s, TRL's GRPO and ours: same model, problems, rollouts an update, two cores",
        figures.peers_rate,
        "`make peers-dev`, then `python -m benchmarks.run peers`",
    ),
    Line("training time to 90 % held-out accuracy, the same sides", figures.peers_time, "the same run"),
    Line(
        "reward at the end, S = 0 to 8, clip around the behaviour / the proximal policy",
        figures.learning,
        "`python -m benchmarks.run learning`, mean over seeds",
    ),
    Line(
        "a learner step against its forward, backward and optimizer alone",
        figures.learner_step,
        "`python -m benchmarks.run cpu --only learner_step`",
    ),
    Line("ledger under simulated faults", figures.histories, f"{PROMISE}: `orz sim --seeds 1000`"),
    Line("10,000 generators, 100 steps of 8,192, simulated", figures.large, f"{PROMISE}: `orz sim --scale`"),
    Line(
        "step of tiny_cpu, simulated / measured, rates of other runs",
        figures.predicted,
        "`python -m benchmarks.run scale`",
    ),
    Line("samples/s of a 7B, simulated, GPU rates assumed, S = 0 -> 1 -> 4", figures.scaling, SAME),
    Line("left of the same by failures, 64 GPUs, S = 1, simulated", figures.failures, SAME),
    Line(
        "rollouts/s of 8,192 tokens through the broker, 1 to 64 generators",
        figures.wire,
        "`python -m benchmarks.run wire`",
    ),
    Line("broker's thread, CPU for the 8,192 rollouts of an ORZ step", figures.broker_cpu, SAME),
    Line("mutated frames: crashes, memory", figures.fuzz, f"{PROMISE}: `make fuzz`"),
    Line(
        "`gae` of 1 M tokens on one core; against a loop over arrays",
        lambda r: figures.of_op(r, "gae_1M", "c++ (1 core)", "python loop over arrays"),
        CPU_OPS,
    ),
    Line("`pack` of 8,192 lengths over 16 ranks; against Python; imbalance", figures.pack, SAME),
    Line("`delta`, 2 % of bf16 words changed; payload", figures.delta, SAME),
    Line("`ppo_head`, float32, against eager torch", figures.ppo_head, SAME),
    Line(
        "`orz report` of 1,000 steps x 8,192 rollouts",
        figures.report,
        "`python -m benchmarks.run report`, synthetic run",
    ),
    Line(
        "weights sent for one update, bf16, 0.5B shape, LR 1e-6",
        figures.sent,
        "`python -m benchmarks.run weights`",
    ),
    Line("the same, demo in float32, where every word changes", figures.sent_whole, "the same run"),
    Line("learner's bytes for 8 generators, as a multiple of one", figures.relays, "the same run"),
    Line("a snapshot whose connection is cut half-way", figures.resumed, "the same run"),
    Line(
        "the demo on two vLLM daemons, seed 2; one killed, one more joining",
        figures.vllm_demo,
        "`python -m benchmarks.vllm_demo --python .venv-vllm/bin/python --seed 2`",
    ),
    Line("vLLM / embedded, tokens/s at 8, 32, 128 at once", figures.vllm_speed, VLLM.format("speed")),
    Line("vLLM, tokens/s while 34 MB versions travel / without", figures.vllm_travel, VLLM.format("travel")),
)

STORM = f"{PROMISE}: `make chaos`"
PROMISES = (
    Line("nothing lost, nothing trained twice, no token older than S, every run finishes", figures.chaos, STORM),
    Line("a dead generator's leases are lent again", figures.detection, "the same run"),
    Line(
        "a run killed anywhere is, bit for bit, the run nobody killed",
        figures.replayed,
        "the same run, then `orz replay`",
    ),
    Line("a checkpoint is whole or absent", figures.saves, "`python -m tests.chaos.saves --kills 100`, part of it"),
    Line("a full disk ends the learner politely, and it goes on when there is space", figures.full_disk, STORM),
)
