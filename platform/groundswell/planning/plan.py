"""From an experiment and a number of GPUs to a plan: what fits, what binds, how long it takes, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from groundswell.config import ConfigError
from groundswell.experiment import Experiment, Scaling
from groundswell.planning import strategies
from groundswell.planning.footprint import Meter
from groundswell.planning.hardware import GB, Gpu
from groundswell.planning.strategies import (
    ADAM_BYTES,
    ADAM_TRAFFIC,
    Extra,
    Footprint,
    Memory,
    PlanExtras,
    Sizes,
    Traffic,
)
from groundswell.scaling.network import build_network
from groundswell.training.checkpoint import KEEP_TRAINING_STATES
from groundswell.training.pack import parameter_specs

# CUDA's context (about 0.5 GiB), NCCL's buffers (about 0.5), and blocks of the caching allocator that fit nothing: an
# assumption, --reserve-gib replaces it.
RESERVE_GIB = 2.0
# What collectives reach of the links' data-sheet rate: all-reduce on four servers of 8 H100, 331 of 400 GB/s (bus
# bandwidth of nccl-tests, published by Voltage Park and Georgia Tech).
COLLECTIVE_EFFICIENCY = 0.8
HOST_GBPS = 400.0  # memory bandwidth of a two-socket server (16 channels of DDR4-3200), shared by its GPUs
# What costs up to so much more is as cheap, and then the simpler strategy wins: a part, and so many seconds a step,
# less than what launching the kernels of a few blocks takes.
SAME_COST, SAME_SECONDS = 1.02, 1e-3


@dataclass(frozen=True)
class Machine:
    """GPUs and the assumptions about them."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    mfu: float | None = None
    reserve_gib: float = RESERVE_GIB
    price_per_gpu_hour: float | None = None

    @property
    def efficiency(self) -> float:
        return self.gpu.mfu if self.mfu is None else self.mfu

    def bus_bytes_per_s(self, workers: int) -> float:
        """What each GPU of a ring sends. Between servers the rings of a node share its network cards."""
        gbps = self.gpu.link_gbps
        if workers > self.gpus_per_node:
            gbps = min(gbps, self.gpu.nic_gbps * self.gpus_per_node)
        return gbps * GB * COLLECTIVE_EFFICIENCY


@dataclass(frozen=True)
class Row:
    """One strategy."""

    scaling: Scaling  # with its micro-batch
    memory: Memory
    fits: bool
    binds: str  # what stands in the way of fitting, or of a larger micro-batch
    traffic: Traffic
    flops: float  # of a step, on all GPUs
    compute_s: float
    update_s: float
    exposed_s: float  # communication that nothing hides

    @property
    def step_s(self) -> float:
        return self.compute_s + self.update_s + self.exposed_s

    @property
    def num_gpus(self) -> int:
        return self.scaling.num_workers


@dataclass(frozen=True)
class Storage:
    """Files of the run's checkpoints at its end."""

    num_weights: int
    num_states: int
    weights_bytes: float  # of one
    state_bytes: float  # of one

    @property
    def total_bytes(self) -> float:
        return self.num_weights * self.weights_bytes + self.num_states * self.state_bytes


@dataclass(frozen=True)
class WeakPoint:
    """One size of a run whose batch grows with the GPUs."""

    num_gpus: int
    batch_size: int
    step_s: float
    examples_per_s: float
    efficiency: float  # throughput of a GPU relative to the first point


@dataclass(frozen=True)
class Plan:
    name: str
    experiment: Experiment
    machine: Machine
    sizes: Sizes
    extra: Extra
    num_updates: int
    rows: Sequence[Row]
    storage: Storage
    notes: Sequence[str] = field(default=())

    @property
    def best(self) -> Row | None:
        """The cheapest that fits and uses all GPUs; where several cost the same, the simplest."""
        fitting = [row for row in self.rows if row.fits and row.num_gpus == self.machine.num_gpus]
        if not fitting:
            return None
        least = min(row.step_s for row in fitting)
        return next(row for row in fitting if row.step_s <= SAME_COST * least + SAME_SECONDS)

    def hours(self, row: Row) -> float:
        return row.step_s * self.num_updates / 3600

    def gpu_hours(self, row: Row) -> float:
        return self.hours(row) * row.num_gpus

    def cost(self, row: Row) -> float | None:
        price = self.machine.price_per_gpu_hour
        return None if price is None else price * self.gpu_hours(row)


class Planner:
    """Makes the plans of one experiment; measurements are shared between them."""

    def __init__(self, name: str, experiment: Experiment, extras: PlanExtras | None = None) -> None:
        """Raises ConfigError for what cannot be planned."""
        replaced = experiment.model.stand_in(experiment)
        if replaced is not None:
            experiment, extras = replaced
        if experiment.scaling.precision == "float64":
            raise ConfigError("scaling.precision: float64 is not planned for; use float32, tf32 or bf16")
        self.name, self.experiment = name, experiment
        self.extras: PlanExtras = extras or (lambda _experiment, _micro_batch: Extra("none"))
        self.sizes, self.spread_error = network_sizes(experiment)
        self.meter = Meter(experiment, self.extras(experiment, 1).gradients_pass_network)

    def plan(self, machine: Machine) -> Plan:
        """Raises ConfigError where the GPU lacks the precision, or the model cannot be spread over several."""
        experiment = self.experiment
        machine.gpu.tflops(experiment.scaling.precision)
        if self.spread_error and machine.num_gpus > 1:
            raise ConfigError(self.spread_error)
        scalings = strategies.candidates(experiment, machine.num_gpus)
        notes = [f"only on one GPU: {self.spread_error}"] if self.spread_error else []
        if self.spread_error:
            scalings = scalings[:1]
        rows = [self._row(scaling, machine, experiment.budget.batch_size) for scaling in scalings]
        extra = self.extras(experiment, 1)
        return Plan(
            self.name, experiment, machine, self.sizes, extra, _updates(experiment), rows,
            _storage(experiment, self.sizes), notes,
        )  # fmt: skip

    def weak_scaling(self, plan: Plan, gpus: Sequence[int]) -> list[WeakPoint]:
        """The best row's strategy with as many examples a GPU everywhere. Empty where nothing fits."""
        if plan.best is None:
            return []
        local = -(-self.experiment.budget.batch_size // plan.machine.num_gpus)
        points: list[WeakPoint] = []
        for count in gpus:
            scaling = Scaling.from_dict(plan.best.scaling.to_dict() | {"num_workers": count})
            row = self._row(scaling, replace(plan.machine, num_gpus=count), local * count)
            rate = local * count / row.step_s
            first = points[0] if points else None
            efficiency = rate / count / (first.examples_per_s / first.num_gpus) if first else 1.0
            points.append(WeakPoint(count, local * count, row.step_s, rate, efficiency))
        return points

    # ---- one row ----

    def _row(self, scaling: Scaling, machine: Machine, batch_size: int) -> Row:
        local = -(-batch_size // scaling.num_workers)
        if batch_size < scaling.num_workers:
            raise ConfigError(
                f"--gpus {scaling.num_workers}: budget.batch_size {batch_size} has not one example for each; "
                f"raise --budget.batch_size or use at most {batch_size} GPUs"
            )

        def memory(micro_batch: int) -> Memory:
            footprint = self._footprint(scaling, micro_batch)
            extra = self.extras(self.experiment, micro_batch)
            reserve = machine.reserve_gib * 2**30
            return strategies.memory(scaling, self.sizes, footprint, extra, _data_bytes(self.experiment), reserve)

        limit = machine.gpu.memory_bytes
        # A single process trains the batch in one piece unless told otherwise, as the others do.
        sizes = [min(scaling.micro_batch, local)] if scaling.micro_batch else _powers(local)
        micro_batch = largest(sizes, lambda size: memory(size).gpu_total <= limit) or sizes[0]
        used = memory(micro_batch)
        fits = used.gpu_total <= limit
        binds = _binds(scaling, used, fits, micro_batch >= local, limit)
        chosen = scaling.model_copy(update={"micro_batch": micro_batch})
        return self._timed(chosen, machine, local, used, fits, binds)

    def _footprint(self, scaling: Scaling, micro_batch: int) -> Footprint:
        return self.meter.footprint(
            micro_batch,
            strategies.arithmetic(scaling),
            spread=not self.spread_error,
            checkpointing=scaling.activation_checkpointing,
        )

    def _timed(self, scaling: Scaling, machine: Machine, local: int, used: Memory, fits: bool, binds: str) -> Row:
        micro_batch = scaling.micro_batch or local
        micro_steps = -(-local // micro_batch)
        footprint, extra = self._footprint(scaling, micro_batch), self.extras(self.experiment, micro_batch)
        passes = footprint.forward_flops * (1 + extra.forwards) + footprint.backward_flops
        local_flops = local * (passes / micro_batch + extra.flops_per_example)
        traffic = strategies.traffic(scaling, self.sizes, micro_steps, extra, footprint.backward_flops > 0)
        gpu = machine.gpu
        compute_s = self._compute_s(scaling, machine, local, micro_steps, footprint, extra)
        bus = machine.bus_bytes_per_s(scaling.num_workers)
        pcie_s = traffic.host / (gpu.pcie_gbps * GB)
        over_all_passes = scaling.offload == "all"  # transfers then run beside them
        hidden_s = traffic.hidden / bus + (pcie_s if over_all_passes else 0.0)
        exposed_s = traffic.exposed / bus + max(0.0, hidden_s - traffic.cover * compute_s)
        exposed_s += 0.0 if over_all_passes else pcie_s
        return Row(
            scaling, used, fits, binds, traffic, local_flops * scaling.num_workers, compute_s,
            self._update_s(scaling, machine, extra), exposed_s,
        )  # fmt: skip

    def _compute_s(
        self, scaling: Scaling, machine: Machine, local: int, micro_steps: int, footprint: Footprint, extra: Extra
    ) -> float:
        """The slower of computing and of reading (roofline): a pass reads all weights, however few its examples."""
        rate = machine.gpu.tflops(scaling.precision) * 1e12 * machine.efficiency
        bandwidth = machine.gpu.memory_gbps * GB
        micro_batch = scaling.micro_batch or local
        flops = local * (footprint.forward_flops * (1 + extra.forwards) + footprint.backward_flops) / micro_batch
        passes = 1 + extra.forwards + (2 if footprint.backward_flops else 0)
        weights = strategies.compute_bytes(scaling) * self.sizes.total * passes * micro_steps
        own = max(flops / rate, weights / bandwidth)
        return own + local * max(extra.flops_per_example / rate, extra.moved_bytes_per_example / bandwidth)

    def _update_s(self, scaling: Scaling, machine: Machine, extra: Extra) -> float:
        """AdamW is bound by memory bandwidth: the GPU's, or the host's where it is offloaded."""
        shards = scaling.num_workers if scaling.strategy in ("fsdp", "deepspeed") else 1
        on_host = scaling.offload != "none"
        rate = HOST_GBPS / min(machine.gpus_per_node, machine.num_gpus) if on_host else machine.gpu.memory_gbps
        own = ADAM_TRAFFIC * self.sizes.trained / shards / (rate * GB)
        return own + ADAM_TRAFFIC * extra.trained_parameters / (machine.gpu.memory_gbps * GB)


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, by bisection: memory grows with the size. None where the first does
    not."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


def _powers(local: int) -> list[int]:
    """1, 2, 4, ... and `local` itself."""
    return [*(2**k for k in range(local.bit_length()) if 2**k < local), local]


def _binds(scaling: Scaling, used: Memory, fits: bool, whole_batch: bool, limit: float) -> str:
    if fits:
        return "nothing: the whole batch fits" if whole_batch else "activations: a larger micro_batch does not fit"
    alone = {name: value for name, value in used.parts().items() if name != "reserve"}
    worst = max(alone, key=lambda name: alone[name])
    return f"{worst}: {_remedy(scaling, worst)}"


def _remedy(scaling: Scaling, part: str) -> str:
    sharded = scaling.strategy == "fsdp" or (scaling.strategy == "deepspeed" and scaling.zero_stage == 3)
    if part in ("activations", "workspace"):
        smaller = ["lower micro_batch"] if (scaling.micro_batch or 2) > 1 else []
        recompute = [] if scaling.activation_checkpointing or part == "workspace" else ["activation_checkpointing"]
        return ", or ".join([*smaller, *recompute]) or "a shorter task, or a larger GPU"
    if part in ("weights", "gradients", "optimizer"):
        if not sharded:
            return "shard them (fsdp, or deepspeed with a higher zero_stage)"
        return "more GPUs" if scaling.offload == "all" else "more GPUs, or offload"
    return {
        "communication": "blocks are too large for this GPU",
        "extra": "what the method keeps besides its network; lower micro_batch, or a larger GPU",
        "data": "the data set itself; spread the run, or use fewer examples",
    }[part]


# ---- facts of the experiment ----


def network_sizes(experiment: Experiment) -> tuple[Sizes, str]:
    """And why the model cannot be spread over workers; empty where it can."""
    specs = parameter_specs(experiment)
    elements = {spec.name: math.prod(spec.shape) for spec in specs}
    trained = {spec.name for spec in specs if spec.trained}
    total, num_trained = sum(elements.values()), sum(elements[name] for name in trained)
    try:
        network, _ = build_network(experiment)
    except ConfigError as error:
        return Sizes(total, num_trained, 0, 0, total, num_trained), str(error)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    members = [{names[id(p)] for p in block.parameters()} for block in network.blocks]
    block = max((sum(elements[name] for name in own) for own in members), default=0)
    block_trained = max((sum(elements[name] for name in own & trained) for own in members), default=0)
    outside = set(elements) - set().union(*members)
    return (
        Sizes(
            total,
            num_trained,
            block,
            block_trained,
            sum(elements[name] for name in outside),
            sum(elements[name] for name in outside & trained),
        ),
        "",
    )


def _updates(experiment: Experiment) -> int:
    """Raises ConfigError where epochs are asked for and their length is not known."""
    budget = experiment.budget
    if not budget.epochs:
        if budget.steps is None:
            raise ConfigError(
                "budget.seconds: how many updates that is depends on the machine; set --budget.steps, too"
            )
        return budget.steps
    examples = experiment.task.num_train
    if examples is None:
        raise ConfigError("budget.epochs: this task does not say how many examples it has; set budget.steps")
    return budget.epochs * -(-examples // budget.batch_size)


def _data_bytes(experiment: Experiment) -> float:
    """A pack keeps its training rows on the GPU: tokens, positions and targets as int64."""
    task = experiment.task
    if not task.resident:
        return 0.0
    return 8.0 * (task.num_train or 0) * (task.max_length + 2 * task.num_answers)


def _storage(experiment: Experiment, sizes: Sizes) -> Storage:
    """Weights and moments are written as float32; training states of the newest two alone."""
    rule, total = experiment.checkpointing, experiment.budget.total
    saved = [step for step in range(total + 1) if experiment.saves(step)]
    kept = {step for step in saved if experiment.stays(step)} | set(saved[-rule.keep_last :])
    count = len(kept) + bool(rule.best_metric)
    return Storage(count, min(KEEP_TRAINING_STATES, count), 4.0 * sizes.total, float(ADAM_BYTES * sizes.trained))
