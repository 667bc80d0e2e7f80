"""A whole sweep (Ray Tune, MLflow, evaluations, checkpoints) against bare training loops on the same cores.

Three measurements:
* the demo's runs, shortened: trial-steps/s of the sweep against one bare loop a core, all at once;
* tiny runs: seconds a run takes beyond its training;
* 200 tiny runs: does the driver's memory grow.

Ray's start-up is counted apart: the sweep's time is from its first run's start to its last run's end.

    python tests/benchmarks/sweep_efficiency.py [--steps 1000] [--many 200]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import finish, print_table
from rich.console import Console

from groundswell.cluster import local_resources
from groundswell.driver import SweepOptions, listed_runs, run_sweep
from groundswell.rundir import SweepFolder
from groundswell.sweep import Axis, Sweep
from sweeps.grok_wd_layers import build


def shortened(name: str, steps: int, axes: dict[str, Axis], **overrides: object) -> Sweep:
    sweep = build("demo")
    base = sweep.base.with_overrides({"budget.steps": steps, "evaluation.stop": [], **overrides})
    return dataclasses.replace(sweep, name=name, base=base, axes=axes, report=None)


def run(sweep: Sweep, folder: Path) -> tuple[float, float, float]:
    """-> seconds from the first run's start to the last one's end, whole seconds, seconds before the first start."""
    begin = time.time()
    code = run_sweep(sweep, SweepOptions(output=folder), Console(file=open(os.devnull, "w"), force_terminal=False))  # noqa: SIM115
    whole = time.time() - begin
    if code:
        raise SystemExit(f"the sweep ended with exit code {code}")
    statuses = [run.status() for run in SweepFolder(folder / sweep.name).runs()]
    start = min(status.started_ms for status in statuses) / 1e3
    return max(status.ended_ms for status in statuses) / 1e3 - start, whole, start - begin


def bare_worker(sweep: Sweep, start: int, step: int, barrier: object, seconds: object) -> None:
    """One core's share of the runs, one after the other, with nothing but training."""
    import torch

    from groundswell.training.pack import Member, Pack

    torch.set_num_threads(1)
    runs = listed_runs(sweep, SweepOptions())[start::step]
    packs = [Pack([Member.create(planned.experiment, torch.device("cpu"))]) for planned in runs]
    barrier.wait()
    begin = time.time()
    for pack, planned in zip(packs, runs, strict=True):
        pack.train(planned.experiment.budget.steps)
    seconds[start] = time.time() - begin


def bare_seconds(sweep: Sweep, workers: int) -> float:
    """Seconds that the same runs take as bare loops, one process a core."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(workers), context.Array("d", workers)
    processes = [
        context.Process(target=bare_worker, args=(sweep, n, workers, barrier, seconds)) for n in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(seconds)


def memory_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def many_runs(count: int, folder: Path) -> dict[str, float]:
    """In a process of its own: a sweep of `count` tiny runs, its driver's memory after 50 runs and at the end."""
    sweep = shortened(
        "many",
        30,
        {"optimizer.weight_decay": Axis(values=tuple(0.01 * (n + 1) for n in range(count)))},
        **{"model.num_layers": 1, "budget.batch_size": 256, "checkpointing.schedule.every": 30},
    )
    samples: list[tuple[int, float]] = []
    done = threading.Event()

    def watch() -> None:
        runs = SweepFolder(folder / "many")
        while not done.wait(0.5):
            ended = sum(1 for run in runs.runs() if run.status().is_final) if runs.path.exists() else 0
            samples.append((ended, memory_mib()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds, whole, _ = run(sweep, folder)
    done.set()
    watcher.join()
    training = bare_seconds(sweep, local_resources().num_cpus)
    early = next(memory for ended, memory in samples if ended >= count // 4)
    return {"seconds": seconds, "whole": whole, "training": training, "early_mib": early, "late_mib": samples[-1][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000, help="updates of each of the demo's runs")
    parser.add_argument("--many", type=int, default=200, help="tiny runs")
    parser.add_argument("--many-only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.many_only:
        print(json.dumps(many_runs(options.many, options.many_only)))
        return
    workers = local_resources().num_cpus
    axes = {
        "model.num_layers": Axis(values=(2, 3)),
        "optimizer.weight_decay": Axis(values=(0.03, 1.0)),
        "seed": Axis(values=(0, 1)),
    }
    demo = shortened("efficiency", options.steps, axes)
    runs = listed_runs(demo, SweepOptions())
    trial_steps = options.steps * len(runs)
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_seconds(demo, workers)
        seconds, whole, startup = run(demo, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--many", str(options.many), "--many-only", folder]
        many = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    overhead = (many["seconds"] - many["training"]) * workers / options.many
    rows = [
        (f"{len(runs)} bare loops on {workers} cores", f"{bare:.1f}", f"{trial_steps / bare:.1f}"),
        ("the same runs as a sweep", f"{seconds:.1f}", f"{trial_steps / seconds:.1f}"),
        ("  start-up before the first step", f"{startup:.1f}", "-"),
        ("  end: report, tracking, Ray's shutdown", f"{whole - startup - seconds:.1f}", "-"),
        (f"{options.many} tiny runs as a sweep", f"{many['seconds']:.1f}", "-"),
        ("  their training alone", f"{many['training']:.1f}", "-"),
    ]
    print_table("sweep efficiency", ("", "s", "trial-steps/s"), rows)
    early, late = many["early_mib"], many["late_mib"]
    print(f"driver memory after a quarter of {options.many} runs {early:.0f} MiB, at the end {late:.0f} MiB")
    finish(
        {
            "sweep_vs_bare": bare / seconds,
            "overhead_s_per_trial": overhead,
            "driver_growth_mib": many["late_mib"] - many["early_mib"],
            "startup_s": startup,
        }
    )


if __name__ == "__main__":
    main()
