"""The figures of README's tables: one function each, from the committed results to what is written in a cell."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from benchmarks import peers
from benchmarks.e2e import STRICT
from benchmarks.learning import LAST
from benchmarks.newest import Absent, Results, Rows
from orz_async.observe.words import duration as clock

# How figures are written.


def each(values: Iterable[float], form: str) -> str:
    return ", ".join(form.format(value) for value in values)


def least_most(values: Iterable[float], form: str) -> str:
    found = list(values)
    return f"{form.format(min(found))} to {form.format(max(found))}"


def three_digits(value: float) -> float:
    """11,234 -> 11,200: what is noise is not shown."""
    return float(f"{value:.3g}")


# Figures that take more than an expression.


def demo(r: Results, figure: str, form: str) -> str:
    """Held-out, before and after training, of each seed."""
    found = _summaries(r)
    told = ", ".join(f"{form.format(s[f'{figure}_before'])} -> {form.format(s[f'{figure}_after'])}" for s in found)
    return f"{told} (seed {', '.join(v.removeprefix('seed ') for v in r.rows('demo', 'demo').starting('seed'))})"


def _summaries(r: Results) -> list[dict[str, Any]]:
    return [row["notes"]["summary"] for row in r.rows("demo", "demo").starting("seed").values()]


def demo_mismatch(r: Results) -> str:
    return each((s["mismatch_max"] for s in _summaries(r)), "{:.1e}")


def demo_time(r: Results) -> str:
    rows = r.rows("demo", "demo")
    training = f"{clock(median(s['train_wall_s'] for s in _summaries(r)))} training"
    result = "from the command to the result"
    return f"{clock(rows.median(result))}, of it {training}" if result in rows else training


def asynchrony(r: Results) -> str:
    rows = r.rows("async", "async")
    span = least_most([x for row in rows.values() for x in (row["min"], row["max"])], "{:.0f}")
    return f"{each((row['median'] for row in rows.values()), '{:.0f}')} ({span})"


def learner_waits(r: Results) -> str:
    idle = [row["notes"]["learner_idle"]["rollouts"] for row in r.rows("async", "async").values()]
    return each(idle, "{:.0%}")


def overlap(r: Results) -> str:
    """The limit, and the part of it that each lag reached."""
    limit = r.rows("e2e", "e2e overlap limit").median(STRICT)
    reached = r.rows("e2e", "e2e part of the limit")
    return f"limit {limit:.2f}; {_by_lag(reached, '{:.0%}')}"


def overlap_idle(r: Results) -> str:
    """Of the slower side, where that was measured."""
    compared = r.rows("e2e", "e2e part of the limit")  # Absent where the reference is missing
    rows = r.rows("e2e", "e2e overlap")
    told = (f"{variant}: {rows[variant]['notes']['bottleneck_idle']:.1%}" for variant in compared)
    return f"{', '.join(told)} ({rows[STRICT]['notes']['bottleneck']})"


PEER_TASKS = ("demo", "long tail")


def peers_rate(r: Results) -> str:
    """Rollouts/s of TRL, then ours as a multiple, turn by turn."""
    told = []
    for task in PEER_TASKS:
        rows = r.rows("peers", f"peers, {task}")
        without, with_critic = rows.ratio(peers.GRPO), rows.ratio(peers.PPO)
        told.append(f"{task}: TRL {rows.median(peers.TRL):.0f}, ours {without:.1f} x, with critic {with_critic:.1f} x")
    return "; ".join(told)


def peers_time(r: Results) -> str:
    told = []
    for task in PEER_TASKS:
        rows = r.rows("peers", f"peers, {task}, to {peers.TARGET:.0%}")
        seconds = {side: f"{rows.median(side):.0f} s" for side in (peers.TRL, peers.GRPO, peers.PPO)}
        told.append(f"{task}: TRL {seconds[peers.TRL]}, ours {seconds[peers.GRPO]}, with critic {seconds[peers.PPO]}")
    return "; ".join(told)


def time_to_accuracy(r: Results) -> str:
    return _by_lag(r.rows("e2e", "e2e accuracy"), "{:.0f} s")


def throughput(r: Results) -> str:
    """Rollouts/s of the variants that there was time for, embedded engine, then vLLM."""
    told = []
    for part in ("embedded", "vllm"):
        try:
            rows = r.rows("e2e", f"e2e {part}")
        except Absent:
            continue
        for variant in (v.removesuffix(", rollouts/s") for v in rows if v.endswith(", rollouts/s")):
            told.append(f"{part}, {variant}: {rows.median(f'{variant}, rollouts/s'):.0f}")
    if not told:
        raise Absent("no result of e2e with rollouts/s")
    return "; ".join(told)


def _by_lag(rows: Rows, form: str) -> str:
    return ", ".join(f"{variant}: {form.format(row['median'])}" for variant, row in rows.items())


def learning(r: Results) -> str:
    rows = r.rows("learning", "learning")
    chosen = {lag: (f"S = {lag}, ppo", f"S = {lag}, decoupled") for lag in (0, 1, 2, 4, 8)}
    return "; ".join(
        f"S = {lag}: {' / '.join(f'{mean(rows, variant):.3f}' for variant in pair)}"
        for lag, pair in chosen.items()
        if all(variant in rows for variant in pair)
    )


def mean(rows: Rows, variant: str) -> float:
    """Over the seeds, of the mean reward of the last steps."""
    curves = [curve["reward"][-LAST:] for curve in rows[variant]["notes"]["curves"]]
    return fmean(fmean(curve) for curve in curves)


def learner_step(r: Results) -> str:
    rows = r.rows("cpu", "learner_step 128 rollouts")
    return f"{1 / rows.ratio('bare arithmetic'):.2f} x; padded batches would take {rows.ratio('padded'):.2f} x"


def histories(r: Results) -> str:
    rows = r.rows("promises", "ledger under simulated faults")
    return (
        f"{rows.median('histories'):,.0f} histories, {rows.median('faults'):,.0f} faults, "
        f"{rows.median('restarts of the learner'):,.0f} restarts of the learner, "
        f"{rows.median('rollouts trained'):,.0f} rollouts trained: {rows.median('violations'):.0f} violations, "
        f"in {rows.median('one core'):.0f} s"
    )


def large(r: Results) -> str:
    rows = r.rows("promises", "many generators, simulated")
    return f"{rows.median('one core'):.0f} s of one core"


def fuzz(r: Results) -> str:
    rows = r.rows("promises", "mutated frames")
    return (
        f"0 of {rows.median('frames without a crash'):,.0f} in {rows.median('all of them'):.0f} s; "
        f"{rows.median('growth of memory'):.0f} MiB growth"
    )


def predicted(r: Results) -> str:
    rows = r.rows("scale", "validation, tiny_cpu")
    runs = [variant.removesuffix(": measured") for variant in rows if variant.endswith(": measured")]
    return "; ".join(
        f"{run}: {rows.median(f'{run}: simulated'):.2f} / {rows.median(f'{run}: measured'):.2f} s" for run in runs
    )


STRONG = "strong scaling, 7b, assumed H100 rates"
FAILURES = "failures, 7b, assumed H100 rates"


def scaling(r: Results) -> str:
    """Samples/s at S = 0 -> 1 -> 4."""
    rows = r.rows("scale", STRONG)

    def at(gpus: str) -> str:
        return " -> ".join(f"{rows.median(f'{gpus} GPUs, S = {lag}'):.0f}" for lag in (0, 1, 4))

    return "; ".join(f"{gpus} GPUs: {at(gpus)}" for gpus in ("8", "64", "1,024"))


def failures(r: Results) -> str:
    """What is left of the rate without failures, by kind."""
    start = "64 GPUs, S = 1, "
    rows = r.rows("scale", FAILURES).starting(start)
    kept = {variant.removeprefix(start): row["notes"]["of_first"] for variant, row in rows.items()}
    return ", ".join(f"{share:.0%} with {kind}" for kind, share in kept.items() if kind != "no failure")


def wire(r: Results) -> str:
    rows = r.rows("wire", "wire_trajectories_s")

    def span(*words: str) -> str:
        chosen = [three_digits(row["median"]) for variant, row in rows.items() if all(w in variant for w in words)]
        return least_most(chosen, "{:,.0f}")

    return "; ".join(
        f"{kind} {span(kind, 'no journal')}, with journal {span(kind, 'journal interval')}"
        for kind in ("plain", "CURVE")
    )


def broker_cpu(r: Results) -> str:
    rows = r.rows("wire", "wire_8192_rollouts_s")

    def span(word: str) -> str:
        return least_most((row["median"] for variant, row in rows.items() if word in variant), "{:.1f}")

    return f"{span('no journal')} s, with journal {span('journal interval')} s"


def of_op(r: Results, name: str, variant: str, against: str) -> str:
    rows = r.rows("cpu", name)
    return f"{three_digits(rows.median(variant)):g} ms; {rows.ratio(against):.0f} x"


def pack(r: Results) -> str:
    imbalance = r.rows("cpu", "pack_8192_16_ranks").median("imbalance, max / mean")
    return f"{of_op(r, 'pack_8192_16_ranks', 'c++', 'python, same algorithm')}; {imbalance:.3f}"


def delta(r: Results) -> str:
    rows = r.rows("cpu", "delta_bf16_2%")
    speed = max(row["median"] for row in rows.starting("encode + apply less copy").values())
    return f"{speed:.1f} GB/s encoded and applied; {rows.median('payload / tensor'):.1%}"


def ppo_head(r: Results) -> str:
    name = "ppo_head_T4096_V32000_D512"
    times, peak = r.rows("cpu", name), r.rows("cpu", f"{name} peak")
    return (
        f"{times.ratio('eager torch'):.2f} x as fast, turn by turn ({times.ratio('eager torch + entropy'):.2f} x with "
        f"entropy), {peak.median('ppo_head'):.0f} instead of {peak.median('eager torch'):,.0f} MiB"
    )


def report(r: Results) -> str:
    rows = r.rows("report", "report")
    cpu, memory, page = (rows.median(f"1,000 steps x 8,192 rollouts, {unit}") for unit in ("cpu s", "MiB", "MB page"))
    small = rows.median("100 steps x 128 rollouts, s")
    return f"{cpu:.1f} s of CPU, {memory:.0f} MiB, a page of {page:.1f} MB; of 100 steps x 128 in {small:.1f} s"


def sent(r: Results) -> str:
    def said(layers: int) -> str:
        rows = r.rows("weights", f"weights 0.5B shape, {layers} layers, bf16")
        one, behind = rows["follow: bytes / full"], rows.median("4 behind: bytes / full")
        return f"{one['min']:.1f} to {one['max']:.1f} % of their size; {behind:.1f} % for one 4 versions behind"

    try:
        return said(24)
    except Absent:
        return f"{said(4)} (4 of 24 layers)"


def sent_whole(r: Results) -> str:
    probe = r.rows("weights", "weights coding demo fp32").median("probe: is a delta worth coding")
    share = r.rows("weights", "weights demo fp32").median("follow: bytes / full")
    return f"{share:.0f} %: the codec looks for {probe:.0f} ms and sends versions whole"


def relays(r: Results) -> str:
    rows = r.rows("weights", "weights to 8 generators")
    direct, relayed = (rows.median(f"{how}: snapshot, bytes / one") for how in ("directly", "through relays"))
    return f"{direct:.1f} directly, {relayed:.2f} through relays, first snapshot included"


def resumed(r: Results) -> str:
    return f"{r.rows('weights', 'weights resume after a cut').median('received / full'):.3f} of its size received"


def vllm_demo(r: Results) -> str:
    found = r.plain("vllm_demo")
    rollouts = found["rollouts"]
    return (
        f"{found['accuracy_before']:.3f} -> {found['accuracy_after']:.3f}, {rollouts['granted']:,} granted = "
        f"{rollouts['trained']:,} trained, mismatch {found['mismatch_max']:.1e}"
    )


def vllm_speed(r: Results) -> str:
    rows = r.rows("vllm", "vLLM and embedded, demo shape").starting("vLLM")
    return each((rows.ratio(variant) for variant in rows), "{:.2f}")


def vllm_travel(r: Results) -> str:
    rows = r.rows("vllm", "sampling while weights travel")
    always, paced, served = (
        kept(rows, variant) for variant in ("versions travel all the time", "one every 2 s", "one every 2 s, served")
    )
    return f"{always} without a break; at one every 2 s {paced}, served too {served}"


def kept(rows: Rows, variant: str) -> str:
    lost = 1 - rows.ratio(variant)
    return f"{1 - lost:.3f}" if lost > 0 else "no loss visible"


def chaos(r: Results) -> str:
    rows = r.rows("promises", "chaos")
    return (
        f"{rows.median('kill -9'):.0f} kill -9, {rows.median('SIGSTOP'):.0f} SIGSTOP, "
        f"{rows.median('wire faults'):,.0f} wire faults: lost {rows.median('lost'):.0f}, trained twice "
        f"{rows.median('trained twice'):.0f}, lag {rows.median('lag observed'):.0f} of {rows.median('lag allowed'):.0f}"
    )


def detection(r: Results) -> str:
    rows = r.rows("promises", "chaos")
    p50, p99 = rows.median("detection p50"), rows.median("detection p99")
    return f"p50 {p50:.2f} s, p99 {p99:.2f} s at a heartbeat of 0.2 s (n = {rows.median('detections'):.0f})"


def killed(r: Results) -> str:
    rows = r.rows("promises", "chaos")
    at_points = rows.median("kill -9: learner at named points")
    parts = {
        name: f"{rows.median(f'kill -9: {name}s'):.0f} {name}s"
        for name in ("lean generator", "generator daemon", "learner", "launcher")
    }
    parts["learner"] += f" ({at_points:.0f} of them at {rows.median('named points'):.0f} named points)"
    return f"{', '.join(parts.values())}, in {clock(rows.median('all of it'))}"


def replayed(r: Results) -> str:
    return f"{r.rows('promises', 'chaos').median('steps replayed bit for bit'):.0f} steps"


def saves(r: Results) -> str:
    rows = r.rows("promises", "chaos, saves")
    killed, loadable = rows.median("killed while saving"), rows.median("loadable afterwards")
    return f"{loadable:.0f} of {killed:.0f} loadable after kill -9 during save"


def full_disk(r: Results) -> str:
    is_done = r.rows("promises", "chaos").median("full disk: ended, refused, finished")
    return "exit code 9 twice, then finished" if is_done else "not tried: a small disk could not be mounted"
