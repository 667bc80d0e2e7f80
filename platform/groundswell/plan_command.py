"""`groundswell plan`: will a run fit, what binds, how long does it take, and what does it cost."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from groundswell.cli import split_dotted
from groundswell.config import ConfigError, suggest
from groundswell.planning import hardware, inputs

PLAIN_WIDTH = 240  # of tables that go to a file or a pipe


@dataclasses.dataclass
class Options:
    """Plan a run before it is paid for: memory of each strategy by part, what binds, step time, GPU-hours, storage.

    Any field of the experiment can be set too: --budget.batch_size 256, --scaling.precision bf16.
    """

    experiment: Annotated[str, tyro.conf.Positional] = ""
    """a preset of sweeps/plans, a .yaml, .json or .py file (`experiment`, perhaps `plan_extras`), or a sweep file"""
    preset: str = "demo"
    """of a sweep file: the preset whose first run is planned"""
    gpus: int = 1
    """GPUs of the run"""
    gpu: str = "h200"
    """which; --list lists them; custom: see --memory-gib"""
    gpus_per_node: int = 8
    """GPUs that NVLink or PCIe joins"""
    mfu: float | None = None
    """part of the GPU's peak that a step's matrix products reach (default: by GPU)"""
    price_per_gpu_hour: float | None = None
    """in any currency"""
    weak_scaling: str | None = None
    """numbers of GPUs, for instance 8,32,128: the batch grows with them"""
    memory_gib: float | None = None
    """of a custom GPU"""
    tflops: float | None = None
    """of a custom GPU: dense TFLOP/s in the run's precision"""
    bandwidth: float | None = None
    """of a custom GPU: GB/s to its neighbours, one direction"""
    nic: float | None = None
    """of a custom GPU: GB/s to other servers"""
    reserve_gib: float | None = None
    """GiB of each GPU for CUDA, NCCL and the allocator's gaps (default: 2)"""
    json: bool = False
    """print one JSON object"""
    list: bool = False
    """list presets and GPUs"""


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 when something fits, 1 when nothing does. Raises ConfigError for the user's mistakes."""
    fields, rest = split_dotted(arguments)
    options = _parse(rest)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if options.list or not options.experiment:
        _print_presets(console)
        _print_gpus(console)
        return 0
    gpu = _gpu(options)
    weak = _counts(options.weak_scaling)
    subject = inputs.load(options.experiment, fields, options.preset)
    from groundswell.planning import report  # imports torch
    from groundswell.planning.plan import Machine, Planner

    machine = Machine(gpu, options.gpus, options.gpus_per_node, options.mfu)
    if options.reserve_gib is not None:
        machine = dataclasses.replace(machine, reserve_gib=options.reserve_gib)
    machine = dataclasses.replace(machine, price_per_gpu_hour=options.price_per_gpu_hour)
    planner = Planner(subject.name, subject.experiment, subject.extras)
    plan = planner.plan(machine)
    points = planner.weak_scaling(plan, weak)
    if options.json:
        print(report.to_json(plan, points))
    else:
        report.print_plan(plan, console)
        report.print_weak_scaling(points, console)
    return 0 if plan.best is not None else 1


def _parse(arguments: Sequence[str]) -> Options:
    """Raises ConfigError for an unknown option or a number that makes no sense."""
    options, unknown = tyro.cli(
        Options, prog="groundswell plan", args=[*arguments], description=Options.__doc__, return_unknown_args=True
    )
    if unknown:
        known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(Options)]
        raise ConfigError(f"{unknown[0]}: no such option; {suggest(unknown[0], known)}")
    for name in ("gpus", "gpus_per_node", "mfu", "price_per_gpu_hour", "memory_gib", "tflops", "bandwidth", "nic"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be more than 0")
    if options.mfu is not None and options.mfu > 1:
        raise ConfigError(f"--mfu {options.mfu:g}: is a part of the peak; write 0.4 for 40 %")
    if options.reserve_gib is not None and options.reserve_gib < 0:
        raise ConfigError(f"--reserve-gib {options.reserve_gib:g}: must not be negative")
    return options


def _gpu(options: Options) -> hardware.Gpu:
    if options.gpu == hardware.CUSTOM:
        return hardware.custom_gpu(options.memory_gib, options.tflops, options.bandwidth, options.nic)
    for name in ("memory_gib", "tflops", "bandwidth", "nic"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is for --gpu custom; leave it out with --gpu {options.gpu}")
    return hardware.find_gpu(options.gpu)


def _counts(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--weak-scaling {text}: write numbers of GPUs, for instance 8,32,128")
    return sorted({int(part) for part in parts})


def _print_presets(console: Console) -> None:
    for name, path in inputs.presets().items():
        console.print(f"[bold]{name:<26}[/]{inputs.summary(path)}", highlight=False, soft_wrap=True)
    console.print()


def _print_gpus(console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", title="GPUs", title_justify="left")
    for column in ("name", "GB", "bf16", "tf32", "fp32", "memory", "link", "PCIe", "NIC", "MFU"):
        table.add_column(column, justify="left" if column == "name" else "right")
    table.add_column("source")
    for gpu in hardware.GPUS.values():
        numbers = (gpu.memory_gb, gpu.bf16_tflops, gpu.tf32_tflops, gpu.fp32_tflops, gpu.memory_gbps, gpu.link_gbps)
        cells = [f"{value:g}" if value else "-" for value in (*numbers, gpu.pcie_gbps, gpu.nic_gbps, gpu.mfu)]
        table.add_row(gpu.name, *cells, gpu.source)
    console.print(table)
    console.print("dense TFLOP/s; GB/s in one direction, NIC for one GPU; custom: --memory-gib, --tflops", style="dim")
