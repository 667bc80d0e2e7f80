"""Fifty checkpoints of one run, evaluated in full by one actor and by two.

    python tests/benchmarks/probe_pool.py [--checkpoints 50] [--rounds 3]

Wall time from the first checkpoint handed out to the last answer, with the actors up; start-up is counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import finish, print_table

from analysis.evaluation import Evaluate
from groundswell import cluster
from groundswell.probe_pool import ProbePool
from groundswell.probing import Asking, Target, make_plan
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from groundswell.training.trainer import PackTrainer
from sweeps.grok_wd_layers import build


def train(output: Path, checkpoints: int) -> Target:
    """A run of the grokking demo's deepest shape with a checkpoint after each step."""
    changes: dict[str, object] = {
        "model.num_layers": 3,
        "budget.steps": checkpoints,
        "budget.batch_size": 64,
        "metrics_every": checkpoints,
    }
    changes |= {"checkpointing.schedule.every": 1, "evaluation.stop": [], "evaluation.max_examples": 1}
    experiment = build("demo").base.with_overrides(changes)
    sweep = SweepFolder(output / "pool")
    run = sweep.create_run(PlannedRun(experiment, {}, "run"), "pack", 0)
    trainer = PackTrainer([run])
    while not trainer.finished:
        trainer.advance()
    return Target(sweep, run, tuple(run.checkpoint_steps()))


def evaluate(target: Target, workers: int) -> tuple[float, float]:
    """-> seconds to start the actors, seconds of work with the actors up."""
    shutil.rmtree(target.run.path / "probes", ignore_errors=True)
    probes = (Evaluate(),)
    asking = Asking(lambda job: None)
    with contextlib.closing(ProbePool(probes, asking.finished)) as pool:
        begin = time.monotonic()
        pool.grow(workers)
        while pool.num_ready < workers:
            pool.turn(0.1)
        start = time.monotonic()
        pool.submit(asking.take(make_plan([target], probes).jobs))
        while pool.pending:
            pool.turn(0.5)
        seconds = time.monotonic() - start
    if asking.failures or asking.num_answered != len(target.steps):
        raise SystemExit(f"not all were answered: {asking.all_failures()}")
    return start - begin, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="each measures one actor, then two")
    options = parser.parse_args()
    times: dict[int, list[float]] = {1: [], 2: []}
    starts: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        target = train(Path(folder), options.checkpoints)
        begin = time.monotonic()
        with cluster.connect(None, num_cpus=2):
            ray_seconds = time.monotonic() - begin
            for _ in range(options.rounds):
                for workers in times:
                    start, seconds = evaluate(target, workers)
                    starts[workers].append(start)
                    times[workers].append(seconds)
    rows = []
    for workers, found in times.items():
        start, seconds = statistics.median(starts[workers]), statistics.median(found)
        whole = ray_seconds + start + seconds
        each = f"{1000 * seconds / options.checkpoints:.0f}"
        rows.append((str(workers), f"{seconds:.1f}", each, f"{start:.1f}", f"{whole:.1f}"))
    title = f"{options.checkpoints} checkpoints, evaluated on all splits (medians of {options.rounds} rounds)"
    print_table(title, ("actors", "s", "ms a checkpoint", "actors' start s", "with start-up s"), rows)
    print(f"Ray's own start {ray_seconds:.1f} s")
    ratio = statistics.median(one / two for one, two in zip(times[1], times[2], strict=True))
    starting = [ray_seconds + statistics.median(starts[n]) + statistics.median(times[n]) for n in (1, 2)]
    finish({"two_actors_vs_one": ratio, "with_start_up": starting[0] / starting[1]})


if __name__ == "__main__":
    main()
