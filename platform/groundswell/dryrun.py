"""What a sweep would do: its runs and packs, and an estimate of time and memory from a few real steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from groundswell import cluster
from groundswell.budget import Budget
from groundswell.driver import SweepOptions, listed_runs
from groundswell.progress import format_seconds
from groundswell.stages import is_there, remember
from groundswell.sweep import PlannedRun, Sweep, flops_per_step, make_packs

if TYPE_CHECKING:
    from groundswell.training.pack import Pack

MEASURE_SECONDS = 1.0  # for each shape
AFFORDABLE_FLOPS = 2e11  # a few seconds on one CPU core; a costlier step is tried on fewer examples and scaled up


@dataclass(frozen=True)
class Measured:
    """What one step of a pack takes."""

    seconds: float
    mib: float


def dry_run(sweep: Sweep, options: SweepOptions, console: Console) -> int:
    """Print the plan; trains nothing and writes nothing."""
    runs = _all_runs(sweep, options)
    if any(run.experiment.scaling.distributed for run in runs):
        return _list_spread(sweep, runs, console)
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
    measured: dict[str, Measured] = {}
    longest, untried = 0.0, 0
    remember(options.output / sweep.name)
    for number, pack in enumerate(packs):
        names = "\n".join(f"{run.name}  [dim]{run.run_id}[/]" for run in pack)
        if any(not is_there(run.experiment.get(path)) for run in pack for path in run.inputs):
            untried += 1
            planned = f"{pack[0].experiment.budget.total:,}"
            table.add_row(str(number), names, f"{_num_parameters(pack[0]):,}", planned, "-", "-", "-")
            continue
        key = f"{pack[0].experiment.pack_key()}*{len(pack)}"
        if key not in measured:
            measured[key] = _measure(pack)
        seconds, memory = measured[key].seconds, measured[key].mib
        budget = pack[0].experiment.budget
        steps = budget.total if budget.seconds is None else min(budget.total, round(budget.seconds / seconds))
        total += seconds * steps
        longest = max(longest, seconds * steps)
        peak = max(peak, memory)
        table.add_row(
            str(number),
            names,
            f"{_num_parameters(pack[0]):,}",
            f"{'' if budget.seconds is None else 'about '}{steps:,}",
            f"{1e3 * seconds:.1f}",
            format_seconds(seconds * steps),
            f"{memory:,.0f} MiB",
        )
    console.print(table)
    parallel = max(total / workers, longest)
    console.print(
        f"about {format_seconds(parallel)} of training on {workers} workers (early stops make it shorter), "
        f"up to {peak:,.0f} MiB a worker beyond about 400 MiB for its libraries",
        soft_wrap=True,
        highlight=False,
    )
    if untried:
        console.print(f"{untried} packs start from runs that are not trained yet; they are not in the estimate")
    if options.search == "optuna":
        console.print(f"Optuna chooses the settings as it learns; the {options.num_samples} above are a random example")
    return 0


def _list_spread(sweep: Sweep, runs: list[PlannedRun], console: Console) -> int:
    """Runs over several workers may be larger than this machine: they are listed, not tried."""
    table = Table(title=f"{sweep.name}: {len(runs)} runs", title_justify="left")
    for column in ("run", "parameters", "steps", "strategy", "workers"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        scaling, budget = run.experiment.scaling, run.experiment.budget
        strategy = f"zero {scaling.zero_stage}" if scaling.strategy == "deepspeed" else scaling.strategy
        name = f"{run.name}  [dim]{run.run_id}[/]"
        steps = f"{budget.total:,}" if budget.seconds is None else f"in {format_seconds(budget.seconds)}"
        table.add_row(name, f"{_num_parameters(run):,}", steps, strategy, str(scaling.num_workers))
    console.print(table)
    console.print(
        "groundswell plan tells the memory and the time of runs over several workers", soft_wrap=True, highlight=False
    )
    return 0


def _all_runs(sweep: Sweep, options: SweepOptions) -> list[PlannedRun]:
    if options.search != "optuna":
        return listed_runs(sweep, options)
    return [run for setting in sweep.sample(options.num_samples, options.search_seed) for run in sweep.runs(setting)]


def _num_parameters(run: PlannedRun) -> int:
    task = run.experiment.task
    return sum(math.prod(spec.shape) for spec in run.experiment.model.parameters(task.vocab_size, task.max_length))


def _measure(pack: list[PlannedRun]) -> Measured:
    """A few real steps on this machine, with fewer examples where a whole batch would take too long."""
    import torch

    from groundswell.training.pack import Member, Pack, build_dataset, resolve_device

    first = pack[0].experiment
    torch.set_num_threads(first.scaling.num_threads)
    device = resolve_device(first.scaling)
    examples = first.budget.examples_per_step(len(build_dataset(first).train))
    batch_size = min(first.budget.batch_size, examples)
    flops = sum(flops_per_step(run.experiment) for run in pack) * batch_size / examples
    tried = max(1, round(batch_size * min(1.0, AFFORDABLE_FLOPS / flops)))
    changes: dict[str, Any] = {"scaling.compile": False, "scaling.cuda_graph": False}
    changes |= {"budget": Budget(batch_size=tried)}
    program = Pack([Member.create(run.experiment.with_overrides(changes), device) for run in pack])
    scale = batch_size / tried
    kept = _kept_by_backward(program) * scale
    start, updates = time.perf_counter(), 0
    while updates < 2 or (time.perf_counter() - start < MEASURE_SECONDS and updates < 200):
        program.train(1)
        program.read_metrics()
        updates += 1
    seconds = (time.perf_counter() - start) / updates * scale * examples / batch_size
    own = 4 * program.parameters.flat.nbytes  # weights, gradients, two moments
    return Measured(seconds, (own + kept) / 2**20)


def _kept_by_backward(program: Pack) -> int:
    """Bytes of the tensors that one step's forward pass leaves for its backward pass, parameters apart."""
    import torch

    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        program.train(1)
    program.read_metrics()
    storages.pop(program.parameters.flat.untyped_storage().data_ptr(), None)
    return sum(storages.values())
