"""One run on 1 and 2 workers with every strategy, as bare processes of torch and under Ray Train; what Ray costs.

    python tests/benchmarks/scaling.py [--strategies ddp fsdp ...] [--steps 30] [--rounds 3]

Steps a second are the best reading of each run (of 5 steps each), after the first: a shared machine disturbs readings
one way only. `train_overhead` is how much slower DDP's 2 workers are under Ray Train than bare, the best of each over
rounds that alternate between the two. `start_up_s` is from the command to the end of the first step under Ray Train.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import finish, print_table
from rich.console import Console

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment, Scaling
from groundswell.driver import SweepOptions, run_sweep
from groundswell.planning.hardware import find_gpu
from groundswell.planning.inputs import load
from groundswell.planning.plan import Machine, Planner
from groundswell.rundir import RunFolder, SweepFolder
from groundswell.sweep import PlannedRun, Sweep
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.random_tokens import RandomTokens
from tests.groundswell.scaling.workers import run_workers

STRATEGIES = {
    "ddp": {"scaling.strategy": "ddp"},
    "fsdp": {"scaling.strategy": "fsdp"},
    "zero 1": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 1},
    "zero 2": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 2},
    "zero 3": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 3},
}
READING = 5  # steps


def experiment(steps: int, fields: dict[str, object]) -> Experiment:
    """3.3 million parameters and 1,024 tokens a batch, so that matrix products dominate."""
    base = Experiment(
        task=RandomTokens(vocabulary=512, length=64, answers=64, num_examples=256, num_test=1),
        model=Decoder(num_layers=4, num_heads=4, width=256),
        objective=AnswerLoss(),
        optimizer=AdamW(lr=1e-3),
        budget=Budget(steps=steps, batch_size=16),
        metrics_every=READING,
        evaluation=Evaluation(schedule=Every(every=10**9), max_examples=1),
        checkpointing=Checkpointing(schedule=Every(every=10**9)),
        scaling=Scaling(device="cpu"),
    )
    return base.with_overrides(dict(fields))


def steps_per_s(run: RunFolder) -> float:
    rates = [line["metrics"].get("perf/steps_per_s", 0.0) for line in run.journal()]
    return max(rates[2:])  # without the untrained reading and the first, which allocates


def bare(steps: int, fields: dict[str, object], workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        planned = PlannedRun(experiment(steps, fields | {"scaling.num_workers": workers}), {}, "run")
        run = SweepFolder(Path(folder) / "bare").create_run(planned, "pack", 0)
        run_workers(run, workers)
        return steps_per_s(run)


def under_ray(steps: int, fields: dict[str, object], workers: int) -> tuple[float, float]:
    """-> steps a second, seconds until the first step is done."""
    with tempfile.TemporaryDirectory() as folder:
        spread = {} if workers == 1 and not fields else {"scaling.num_workers": workers}
        sweep = Sweep("ray", experiment(steps, fields | spread), {}, metric="train/loss", mode="min")
        start = time.time_ns()
        if run_sweep(sweep, SweepOptions(output=Path(folder)), Console(file=io.StringIO())):
            raise SystemExit("the run failed")
        (run,) = SweepFolder(Path(folder) / "ray").runs()
        return steps_per_s(run), run.journal()[0]["time_ms"] / 1e3 - start / 1e9


def planned_scaling(preset: str = "gpt2-xl", gpu: str = "a100-80") -> dict[str, float]:
    """What the planner expects of more and more GPUs with as many examples each."""
    subject = load(preset, {})
    planner = Planner(subject.name, subject.experiment, subject.extras)
    points = planner.weak_scaling(planner.plan(Machine(find_gpu(gpu), 8)), (8, 32, 128))
    rows = [(f"{p.num_gpus}", f"{p.step_s:.2f}", f"{p.examples_per_s:.1f}", f"{p.efficiency:.2f}") for p in points]
    print_table(f"weak scaling of {preset} on {gpu}, planned", ["GPUs", "s a step", "examples/s", "efficiency"], rows)
    return {f"planned_efficiency_{p.num_gpus}": p.efficiency for p in points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of bare and Ray Train runs for train_overhead")
    options = parser.parse_args()
    single, start_single = under_ray(options.steps, {}, 1)
    rows = [("single", f"{single:.2f}", "-", "-", "1.00", f"{start_single:.0f}")]
    numbers: dict[str, float] = {"start_up_single_s": round(start_single, 1)}
    for name in options.strategies:
        fields = STRATEGIES[name]
        one, two = bare(options.steps, fields, 1), bare(options.steps, fields, 2)
        ray, start = under_ray(options.steps, fields, 2)
        rows.append((name, f"{one:.2f}", f"{two:.2f}", f"{ray:.2f}", f"{two / single:.2f}", f"{start:.0f}"))
        numbers |= {f"{name.replace(' ', '_')}_2_vs_single": round(two / single, 2)}
    columns = ["strategy", "1 worker, steps/s", "2 workers", "2 under Ray Train", "2 workers / single", "start-up, s"]
    print_table("one run on 2 cores", columns, rows)
    pairs = [
        (bare(options.steps, STRATEGIES["ddp"], 2), *under_ray(options.steps, STRATEGIES["ddp"], 2))
        for _ in range(options.rounds)
    ]
    cells = [(f"{alone:.2f}", f"{ray:.2f}", f"{start:.0f}") for alone, ray, start in pairs]
    print_table("DDP on 2 workers, round by round", ["bare, steps/s", "under Ray Train", "start-up, s"], cells)
    numbers["train_overhead"] = round(max(alone for alone, _, _ in pairs) / max(ray for _, ray, _ in pairs) - 1, 3)
    numbers["start_up_ddp_s"] = round(statistics.median(start for _, _, start in pairs), 1)
    finish(numbers | planned_scaling())


if __name__ == "__main__":
    main()
