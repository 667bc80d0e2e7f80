"""A plan as tables and sentences, and as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from groundswell.planning.hardware import GB
from groundswell.planning.plan import COLLECTIVE_EFFICIENCY, Plan, Row, WeakPoint
from groundswell.planning.strategies import label
from groundswell.progress import format_seconds

PARTS = {  # of Memory, and their columns
    "weights": "weights", "gradients": "grads", "optimizer": "Adam", "activations": "activ.", "workspace": "logits+",
    "communication": "comm.", "extra": "extra", "data": "data", "reserve": "reserve",
}  # fmt: skip


def print_plan(plan: Plan, console: Console) -> None:
    """One line a strategy, then the verdict and the flags to run it with."""
    machine, gpu, experiment = plan.machine, plan.machine.gpu, plan.experiment
    console.print(
        f"[bold]{plan.name}[/]: {count(plan.sizes.total)} parameters ({count(plan.sizes.trained)} trained), "
        f"batch {experiment.budget.batch_size} x {experiment.task.max_length} tokens, {plan.num_updates:,} updates, "
        f"{experiment.scaling.precision}",
        highlight=False,
    )
    console.print(_table(plan))
    console.print(
        f"GB for one GPU of {gpu.memory_gb:g} GB; * the cheapest that fits. {gpu.name} ({gpu.source}): "
        f"{gpu.tflops(experiment.scaling.precision):g} TFLOP/s at {machine.efficiency:.0%} ({_mfu_source(plan)}), "
        f"{machine.bus_bytes_per_s(machine.num_gpus) / GB:.0f} GB/s between GPUs "
        f"({COLLECTIVE_EFFICIENCY:.0%} of the links); evaluation, data loading and launches are not in the times",
        style="dim",
        highlight=False,
    )
    for note in plan.notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(verdict(plan), highlight=False, soft_wrap=True)
    if plan.best is not None:
        console.print(f"  {flags(plan.best)}", highlight=False, soft_wrap=True)


def print_weak_scaling(points: Sequence[WeakPoint], console: Console) -> None:
    if not points:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", title="weak scaling", title_justify="left")
    for column in ("GPUs", "batch", "step", "examples/s", "efficiency"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            str(point.num_gpus),
            f"{point.batch_size:,}",
            seconds(point.step_s),
            f"{point.examples_per_s:,.4g}",
            f"{point.efficiency:.0%}",
        )
    console.print(table)


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    used = [name for name in PARTS if any(getattr(row.memory, name) for row in plan.rows)]
    priced = plan.machine.price_per_gpu_hour is not None
    headings = ["micro", *(PARTS[name] for name in used), "total", "host", "sent", "TFLOP", "step", "hours", "GPU h"]
    for column in [*headings, *(["cost"] if priced else [])]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what binds", min_width=24)
    for row in plan.rows:
        cells = [gb(getattr(row.memory, name)) for name in used]
        times = [seconds(row.step_s), _number(plan.hours(row)), _number(plan.gpu_hours(row))]
        cost = plan.cost(row)
        table.add_row(
            "*" if row is plan.best else "",
            label(row.scaling),
            str(row.scaling.micro_batch),
            *cells,
            gb(row.memory.gpu_total),
            gb(row.memory.host),
            gb(row.traffic.total),
            _number(row.flops / 1e12),
            *times,
            *([f"{cost:,.2f}"] if cost is not None else []),
            row.binds if row.fits else f"[red]too large[/] {row.binds}",
            style="bold" if row is plan.best else ("" if row.fits else "dim"),
        )
    return table


def verdict(plan: Plan) -> str:
    """A sentence or two."""
    machine, best = plan.machine, plan.best
    where = f"{machine.num_gpus} x {machine.gpu.name}"
    storage = plan.storage
    disk = (
        f"Checkpoints need {storage.total_bytes / GB:,.1f} GB on disk: {storage.num_weights} of the weights "
        f"({storage.weights_bytes / GB:,.2f} GB each), {storage.num_states} to resume from "
        f"({storage.state_bytes / GB:,.2f} GB more each)."
    )
    if best is None:
        nearest = min(plan.rows, key=lambda row: row.memory.gpu_total)
        over = nearest.memory.gpu_total / machine.gpu.memory_bytes
        return (
            f"Does not fit on {where}: the smallest, {label(nearest.scaling)}, needs {over:.1f} times the memory; "
            f"{nearest.binds}. {disk}"
        )
    cost = plan.cost(best)
    price = f", {cost:,.2f} at {machine.price_per_gpu_hour:g} a GPU-hour" if cost is not None else ""
    share = best.memory.gpu_total / machine.gpu.memory_bytes
    text = (
        f"Fits on {where} with {label(best.scaling)}, micro-batch {best.scaling.micro_batch}, in {share:.0%} of the "
        f"memory: {seconds(best.step_s)} a step, {format_seconds(plan.hours(best) * 3600)} in all, "
        f"{_number(plan.gpu_hours(best))} GPU-hours{price}."
    )
    single = plan.rows[0]
    if single.fits and single is not best:
        text += f" One GPU alone would take {format_seconds(plan.hours(single) * 3600)}."
    return f"{text} {disk}"


def flags(row: Row) -> str:
    """Options of a sweep file that run this row."""
    own = row.scaling
    fields: dict[str, Any] = {"strategy": own.strategy}
    if own.strategy != "single":
        fields["num-workers"] = own.num_workers
    if own.strategy == "deepspeed":
        fields["zero-stage"] = own.zero_stage
    fields |= {"precision": own.precision, "micro-batch": own.micro_batch}
    if own.activation_checkpointing:
        fields["activation-checkpointing"] = "true"
    if own.offload != "none":
        fields["offload"] = own.offload
    return " ".join(f"--scaling.{name} {value}" for name, value in fields.items())


def to_json(plan: Plan, weak: Sequence[WeakPoint]) -> str:
    """Bytes, seconds, FLOPs."""
    machine, best = plan.machine, plan.best
    return json.dumps(
        {
            "name": plan.name,
            "experiment": plan.experiment.identity,
            "machine": {**vars(machine), "gpu": vars(machine.gpu), "mfu": machine.efficiency},
            "parameters": vars(plan.sizes),
            "extra": vars(plan.extra),
            "updates": plan.num_updates,
            "rows": [_row_values(plan, row) for row in plan.rows],
            "best": None if best is None else label(best.scaling),
            "flags": None if best is None else flags(best),
            "storage": {**vars(plan.storage), "total_bytes": plan.storage.total_bytes},
            "weak_scaling": [vars(point) for point in weak],
            "verdict": verdict(plan),
            "notes": list(plan.notes),
        }
    )


def _row_values(plan: Plan, row: Row) -> dict[str, Any]:
    return {
        "label": label(row.scaling),
        "scaling": row.scaling.to_dict(),
        "fits": row.fits,
        "binds": row.binds,
        "memory_bytes": {**vars(row.memory), "gpu_total": row.memory.gpu_total},
        "sent_bytes_per_step": row.traffic.total,
        "host_bytes_per_step": row.traffic.host,
        "flops_per_step": row.flops,
        "compute_s": row.compute_s,
        "update_s": row.update_s,
        "exposed_s": row.exposed_s,
        "step_s": row.step_s,
        "hours": plan.hours(row),
        "gpu_hours": plan.gpu_hours(row),
        "cost": plan.cost(row),
    }


def count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def gb(value: float) -> str:
    """Gigabytes in four characters or so."""
    amount = value / GB
    if amount == 0:
        return "-"
    return f"{amount:.0f}" if amount >= 99.95 else f"{amount:.1f}" if amount >= 9.995 else f"{amount:.2f}"


def seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mfu_source(plan: Plan) -> str:
    return "as asked for" if plan.machine.mfu is not None else plan.machine.gpu.mfu_source
