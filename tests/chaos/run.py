"""`make chaos`, `python -m tests.chaos.run`: faults on real processes, the promises recomputed, figures printed."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from orz_async.broker.segments import read
from orz_async.broker.verify import Verification, lines, verify
from tests.chaos import scenes
from tests.chaos.folder import DAEMON, LAUNCHER, LEAN, LEARNER, ROOT, Folder, percentile
from tests.chaos.storm import Storm

POINTS = (
    *("after-take:3", "journal-append:20", "checkpoint-renamed:2", "before-publish:4", "checkpoint-prune:2"),
    *("weights-out:4", "after-checkpoint:7", "start-recovered", "checkpoint-files:3", "checkpoint-pruning:2"),
    *("after-publish:3", "checkpoint-rename:2", "start-epoch", "checkpoint-tensors:2", "before-checkpoint:2"),
    *("after-values:9", "journal-segment"),
)
"""Named points, each with how often it is passed before it kills, in an order that lets the run save between them."""

begun = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - begun:6.0f} s  {text}", flush=True)


def make_base(out: Path) -> Path:
    """In a process of its own: this one stays without torch."""
    code = (
        "import sys; from pathlib import Path; from orz_async.learner.base import make_base; "
        "make_base(Path(sys.argv[1]), seed=1, steps=20, threads=1)"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def check(folder: Folder, *, partial: bool = False) -> Verification:
    """`orz verify`, and what it must say of a run that went through this."""
    result = verify(folder.path)
    assert not result.findings, "\n".join(str(finding) for finding in result.findings[:20])
    assert result.finished, f"{result.steps} of {result.planned} steps"
    assert (result.lost, result.trained_twice) == (0, 0)
    assert result.max_lag <= result.bounds.max_lag
    if not partial:
        assert result.in_flight == 0
        assert result.trained == result.steps * result.bounds.rollouts_per_step
    return result


def finite(folder: Folder) -> int:
    """Accepted trajectories; none holds a reward or a log-prob that is not a number."""
    import numpy as np

    from orz_async.records import as_float32

    count = 0
    for trajectory in read(folder.path / "journal"):
        assert np.isfinite(trajectory.reward) and np.isfinite(as_float32(trajectory.logprobs)).all()
        count += 1
    return count


def same_losses(folder: Folder) -> str:
    """The storm's run, trained again from its journal by a learner that nobody kills."""
    done = subprocess.run(
        [sys.executable, "-m", "orz_async.cli", "replay", str(folder.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = (done.stdout.strip().splitlines() or [""])[-1]
    assert done.returncode == 0 and "bit for bit" in told, done.stdout + done.stderr
    return told


def report(folders: list[Folder], storm: Storm) -> None:
    kills = [kill for folder in folders for kill in folder.kills]
    by_kind = Counter(kill.kind for kill in kills)
    named = Counter(kill.point for kill in kills if kill.kind == LEARNER and kill.point != "at random")
    parts = ", ".join(f"{by_kind[kind]} {kind}s" for kind in (LEAN, DAEMON, LEARNER, LAUNCHER))
    print(f"kill -9          {len(kills)}: {parts}")
    print(f"at named points  {sum(named.values())}: {', '.join(f'{point} {n}' for point, n in sorted(named.items()))}")
    if storm.plan:
        print(
            f"not done in time {len(storm.plan)} deaths of the learner: {', '.join(storm.plan)}; give it more --seconds"
        )
    print(f"SIGSTOP          {', '.join(f'{span} {n}' for span, n in sorted(storm.frozen.items()))}")
    for name, proxy in (("wire", storm.wire), ("weights", storm.weights)):
        print(
            f"proxy, {name:9} {', '.join(f'{fault} {n}' for fault, n in sorted(proxy.injected.items())) or 'nothing'}"
        )
    seen = sorted(t for folder in folders for t in folder.detection())
    figures = (
        f"p50 {percentile(seen, 0.5):.2f} s, p99 {percentile(seen, 0.99):.2f} s, most {max(seen, default=0):.2f} s"
    )
    print(f"time to detect   {figures} (n = {len(seen)}): from the kill of a generator to its leases being free")
    back = sorted(t for folder in folders for t in folder.comebacks())
    print(
        f"learner back     p50 {percentile(back, 0.5):.1f} s (n = {len(back)}): from its kill to the next trained step"
    )
    print(f"shown the door   {storm.shown_the_door} generators (NaN results, damaged frames)")


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    options.add_argument("--kills", type=int, default=200, help="kill -9 in total (default: %(default)s)")
    options.add_argument("--seconds", type=float, default=480.0, help="the storm's time at most (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--random-deaths", type=int, default=4, help="of the learner (default: %(default)s)")
    options.add_argument("--launcher-kills", type=int, default=3, help="(default: %(default)s)")
    options.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder, deleted)")
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is closed
    with tempfile.TemporaryDirectory(prefix="orz-chaos-") as temporary:
        root = given.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        base = make_base(root / "base")
        say("the base model is made")
        folder = Folder(root / "storm", base)
        with closing(folder):
            storm = Storm(
                folder,
                points=POINTS,
                random_deaths=given.random_deaths,
                kills=given.kills - given.launcher_kills - 2,
                seconds=given.seconds,
                kill_every_s=1.2,
                daemons=2,
                seed=given.seed,
                say=say,
            )
            storm.run()
        result = check(folder)
        say(f"storm: verified, {finite(folder)} accepted results, all finite; {same_losses(folder)}")
        others = []
        for scene in (scenes.retention, scenes.full_disk, scenes.launcher):
            others.append(scene(root, base, given.launcher_kills, say))
            check(others[-1], partial=scene is scenes.retention)
            say(f"{scene.__name__}: verified")
        print()
        report([folder, *others], storm)
        for name, value in lines(result):
            print(f"{name:16} {value}")
    print(f"chaos: nothing lost, nothing trained twice, every run finished; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
