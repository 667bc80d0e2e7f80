"""What a sweep would do: its runs and packs, and an estimate of time and memory from a few real steps."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.table import Table

from groundswell import cluster
from groundswell.driver import SweepOptions, listed_runs
from groundswell.progress import format_seconds
from groundswell.sweep import PlannedRun, Sweep, cost, make_packs

MEASURE_SECONDS = 1.0  # for each shape
AFFORDABLE_FLOPS = 1e12  # a step that costs more is extrapolated from the others, or from ASSUMED_RATE
ASSUMED_RATE = 3e10  # FLOP/s of one CPU core on small matrices


def dry_run(sweep: Sweep, options: SweepOptions, console: Console) -> int:
    """Print the plan; trains nothing and writes nothing."""
    runs = _all_runs(sweep, options)
    machine = cluster.local_resources()
    scaling = sweep.base.scaling
    on_gpu = machine.num_gpus > 0 and scaling.device != "cpu"
    workers = options.num_cpus or machine.workers(scaling.num_threads, on_gpu)
    packs = make_packs(runs, workers, on_gpu, options.pack)
    table = Table(
        title=f"{sweep.name}: {len(runs)} runs in {len(packs)} packs on {workers} workers", title_justify="left"
    )
    for column in ("pack", "runs", "parameters a run", "steps", "ms a step", "time", "memory"):
        table.add_column(column, justify="left" if column == "runs" else "right")
    total, peak = 0.0, 0.0
    measured: dict[str, float] = {}
    for number, pack in enumerate(packs):
        seconds = _seconds_per_step(pack, measured)
        steps = pack[0].experiment.budget.steps
        memory = _memory_mib(pack)
        total += seconds * steps
        peak = max(peak, memory)
        table.add_row(
            str(number),
            "\n".join(f"{run.name}  [dim]{run.run_id}[/]" for run in pack),
            f"{_num_parameters(pack[0]):,}",
            f"{steps:,}",
            f"{1e3 * seconds:.1f}",
            format_seconds(seconds * steps),
            f"{memory:,.0f} MiB",
        )
    console.print(table)
    parallel = max(
        total / workers, max((_seconds_per_step(p, measured) * p[0].experiment.budget.steps for p in packs), default=0)
    )
    console.print(
        f"about {format_seconds(parallel)} of training on {workers} workers (early stops make it shorter), "
        f"{peak:,.0f} MiB a worker beyond about 400 MiB for its libraries",
        soft_wrap=True,
        highlight=False,
    )
    if options.search == "optuna":
        console.print(f"Optuna chooses the settings as it learns; the {options.num_samples} above are a random example")
    return 0


def _all_runs(sweep: Sweep, options: SweepOptions) -> list[PlannedRun]:
    if options.search != "optuna":
        return listed_runs(sweep, options)
    return [run for setting in sweep.sample(options.num_samples, options.search_seed) for run in sweep.runs(setting)]


def _num_parameters(run: PlannedRun) -> int:
    task = run.experiment.task
    return sum(math.prod(spec.shape) for spec in run.experiment.model.parameters(task.vocab_size, task.max_length))


def _seconds_per_step(pack: list[PlannedRun], measured: dict[str, float]) -> float:
    """Timed on this machine once for each shape; a step too costly to try is scaled by its FLOPs."""
    first = pack[0].experiment
    key = f"{first.pack_key()}*{len(pack)}"
    if key not in measured:
        flops = cost(pack) / first.budget.steps
        if flops > AFFORDABLE_FLOPS:
            measured[key] = flops / ASSUMED_RATE
        else:
            measured[key] = _time_step(pack)
    return measured[key]


def _time_step(pack: list[PlannedRun]) -> float:
    import torch

    from groundswell.training.pack import Member, Pack, resolve_device

    torch.set_num_threads(pack[0].experiment.scaling.num_threads)
    device = resolve_device(pack[0].experiment.scaling)
    program = Pack([Member.create(run.experiment, device) for run in pack])
    program.train(2)
    program.read_metrics()
    start, steps = time.perf_counter(), 0
    while steps < 3 or (time.perf_counter() - start < MEASURE_SECONDS and steps < 200):
        program.train(3)
        program.read_metrics()
        steps += 3
    return (time.perf_counter() - start) / steps


def _memory_mib(pack: list[PlannedRun]) -> float:
    """Weights, gradients and two moments (16 bytes a parameter), and the activations that backward keeps."""
    e = pack[0].experiment
    parameters = _num_parameters(pack[0])
    # Backward keeps about one float for every two multiply-adds' outputs: measured near 14 widths a token and layer;
    # from FLOPs alone: activations ~ flops / (2 * typical inner dimension of 128).
    flops = e.model.flops_per_example(e.task.vocab_size, e.task.max_length, e.task.num_answers)
    logits = e.task.num_answers * e.task.vocab_size
    activations = e.budget.batch_size * (flops / 256 * 4 + 3 * logits * 4)
    return len(pack) * (16 * parameters + activations) / 2**20
