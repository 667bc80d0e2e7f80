"""A sweep: a base experiment, axes by dotted path, and how to report. Expands to runs; starts nothing."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from groundswell.config import Config, ConfigError, suggest
from groundswell.experiment import Experiment
from groundswell.probes import Probe
from groundswell.stages import Stage, check_stages, reference

STAGE = "stage"  # the column of a pipeline's runs


class Axis(Config):
    """One dimension of the search: the values of a grid, or a range for random search and Optuna.

    `also` names further paths that take the same value (for instance the task's seed along with the run's).
    `named` makes the axis one of names, each of which stands for several fields: name -> {dotted path: value}.
    Random search and Optuna draw from the range where one is given, else from the values.
    """

    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="uniform in the logarithm")
    integer: bool = False
    also: tuple[str, ...] = ()
    named: Mapping[str, Mapping[str, Any]] | None = None

    @classmethod
    def of_names(cls, named: Mapping[str, Mapping[str, Any]]) -> Axis:
        """All names, in order."""
        return cls(values=tuple(named), named=named)

    @model_validator(mode="after")
    def _check(self) -> Axis:
        if self.named is not None:
            for value in self.values:
                if value not in self.named:
                    raise ValueError(f"no such value '{value}'; {suggest(str(value), list(self.named))}")
        if (self.low is None) != (self.high is None):
            raise ValueError("a range needs both low and high")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"a logarithmic range needs low > 0, got {self.low:g}")
        elif not self.values:
            raise ValueError("needs values, or a range (low, high)")
        return self

    def overrides(self, path: str, value: Any) -> dict[str, Any]:
        """The fields that this value of the axis sets."""
        return dict(self.named[value]) if self.named is not None else dict.fromkeys((path, *self.also), value)

    def sample(self, generator: np.random.Generator) -> Any:
        if self.low is None or self.high is None:
            return self.values[int(generator.integers(len(self.values)))]
        if self.log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        return round(value) if self.integer else value


Setting = Mapping[str, Any]  # dotted path -> value, without the replicate axis


@dataclass(frozen=True)
class PlannedRun:
    """One experiment of a sweep with its place on the axes."""

    experiment: Experiment
    axes: dict[str, Any]
    name: str  # short and comparable: "num_layers=2 weight_decay=0.3 seed=1"
    inputs: Mapping[str, str] = field(default_factory=dict)  # of a stage: field -> run id of where it comes from
    decisive: bool = True  # does the search look at its metric? Of a pipeline the last stage's alone

    @property
    def run_id(self) -> str:
        return self.experiment.run_id


@dataclass(frozen=True)
class Sweep:
    """What a sweep file builds.

    `metric` at a run's last evaluation is what Optuna and the schedulers look at. `also` names further metrics
    (name -> mode) that Optuna weighs along with it: it then looks for settings of which none is better in all of them
    (the Pareto front), and schedulers still go by `metric` alone. `replicate_axis` is averaged over:
    each setting is run once for each of its values. `probes` are asked of each run's last checkpoint, or with
    `probe_steps` "all" of every scheduled one, beginning while the sweep trains. `report` turns the results into a
    table and figures. `fields` win over what named axes set (they come from the command line).

    With `stages` each setting is a pipeline: one run a stage and replicate. An axis changes the stages that have one of
    its fields, so what stages share (one teacher for several students) is trained once. The search looks at `metric`
    of the last stage.
    """

    name: str
    base: Experiment
    axes: Mapping[str, Axis]
    metric: str
    mode: Literal["max", "min"] = "max"
    also: Mapping[str, Literal["max", "min"]] = field(default_factory=dict)
    replicate_axis: str = "seed"
    report: Callable[..., Any] | None = field(default=None, compare=False)
    probes: tuple[Probe, ...] = ()
    probe_steps: Literal["last", "all"] = "last"
    fields: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        check_stages(self.stages)

    @property
    def columns(self) -> tuple[str, ...]:
        """What tells the runs of this sweep apart."""
        return (STAGE, *self.axes) if self.stages else tuple(self.axes)

    @property
    def objectives(self) -> dict[str, Literal["max", "min"]]:
        """All metrics that Optuna looks at, with their modes."""
        return {self.metric: self.mode, **self.also}

    def replicates(self) -> tuple[Any, ...]:
        axis = self.axes.get(self.replicate_axis)
        return axis.values if axis else (self.base.get(self.replicate_axis),)

    def search_axes(self) -> dict[str, Axis]:
        return {path: axis for path, axis in self.axes.items() if path != self.replicate_axis}

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the axes' values. Raises ConfigError for an axis that only has a range."""
        axes = self.search_axes()
        for path, axis in axes.items():
            if not axis.values:
                raise ConfigError(
                    f"{path}: a grid needs values, this axis has only a range; use --search random or optuna"
                )
        return [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*(a.values for a in axes.values()))
        ]

    def sample(self, count: int, seed: int) -> list[dict[str, Any]]:
        """`count` independent settings."""
        generator = np.random.default_rng(seed)
        return [{path: axis.sample(generator) for path, axis in self.search_axes().items()} for _ in range(count)]

    def runs(self, setting: Setting) -> list[PlannedRun]:
        """The setting's runs, one a replicate (and stage). Raises ConfigError that names the field and the
        combination."""
        planned = []
        for replicate in self.replicates():
            axes = dict(setting)
            if self.replicate_axis in self.axes:
                axes[self.replicate_axis] = replicate
            planned += self._pipeline(axes) if self.stages else [self._run(self.base, axes)]
        return planned

    def _run(self, base: Experiment, axes: dict[str, Any], stage: str = "") -> PlannedRun:
        named = {key: value for key, value in axes.items() if self.axes[key].named is not None}
        overrides: dict[str, Any] = {}
        for key, value in named.items():
            overrides |= self.axes[key].overrides(key, value)
        overrides |= self.fields if named else {}  # else the base has them
        for key, value in axes.items():
            overrides |= {} if key in named else self.axes[key].overrides(key, value)
        if stage:  # whose changes have the fields already
            given = {path.removeprefix(f"{stage}.") for path in self.fields}
            overrides = {path: value for path, value in overrides.items() if base.has(path) and path not in given}
        try:
            experiment = base.with_overrides(overrides)
        except ConfigError as error:
            raise ConfigError(f"{error} (run {run_name(axes)})") from None
        axes = {
            key: _plain(experiment.get(key), value) if key not in named and experiment.has(key) else value
            for key, value in axes.items()
        }
        axes = {STAGE: stage, **axes} if stage else axes
        return PlannedRun(experiment, axes, run_name(axes))

    def _pipeline(self, axes: Mapping[str, Any]) -> list[PlannedRun]:
        """One run a stage. Axes that change neither a stage nor what it starts from are not its own."""
        made: dict[str, PlannedRun] = {}
        for stage in self.stages:
            sources = stage.sources()
            try:
                base = self.stage_base(stage)
                inputs = {path: made[source].run_id for path, (source, _) in sources.items()}
                base = base.with_overrides(
                    {path: reference(inputs[path], which) for path, (_, which) in sources.items()}
                )
            except ConfigError as error:
                raise ConfigError(f"stage {stage.name}: {error}") from None
            earlier = {key for source, _ in sources.values() for key in made[source].axes}
            own = {key: value for key, value in axes.items() if key in earlier or self._concerns(base, key, value)}
            run = self._run(base, own, stage.name)
            made[stage.name] = replace(run, inputs=inputs, decisive=stage is self.stages[-1])
        return list(made.values())

    def stage_base(self, stage: Stage) -> Experiment:
        """The stage's experiment before its axes and inputs."""
        return self.base.with_overrides(dict(stage.changes))

    def _concerns(self, base: Experiment, key: str, value: Any) -> bool:
        return any(base.has(path) for path in self.axes[key].overrides(key, value))

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "mode": self.mode,
            **({"also": dict(self.also)} if self.also else {}),
            "replicate_axis": self.replicate_axis,
            "axes": {path: axis.to_dict() for path, axis in self.axes.items()},
            **({"stages": [stage.name for stage in self.stages]} if self.stages else {}),
            "base": self.base.to_dict(),
        }


def _plain(parsed: Any, given: Any) -> Any:
    """A field's value as the experiment has it (the bare word null may be a name), where that is a plain value."""
    return parsed if isinstance(parsed, str | int | float) else given


def run_name(axes: Mapping[str, Any]) -> str:
    """ "model.num_layers": 2 -> "num_layers=2"; the whole path where two axes end alike."""
    last = [path.rsplit(".", 1)[-1] for path in axes]
    labels = [path if last.count(short) > 1 else short for path, short in zip(axes, last, strict=True)]
    return " ".join(f"{label}={format_value(value)}" for label, value in zip(labels, axes.values(), strict=True))


def format_value(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value  # numpy's scalars
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def unique_runs(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Equal experiments once, in order."""
    return list({run.run_id: run for run in runs}.values())


# ---- packs ----

DISPATCH_BOUND_FLOPS = 6e7  # forward FLOPs of a batch below which packing pays on a CPU (measured: B 32 yes, B 512 no)
CPU_PACK, GPU_PACK = 8, 64
NOMINAL_FLOPS_PER_S = 1e10  # about a CPU core; weighs budgets of seconds against others of the same sweep, no more


def pack_size(
    experiment: Experiment, num_runs: int, num_workers: int, on_gpu: bool, pack: int | Literal["auto"]
) -> int:
    """Runs in one pack: a number as it is; "auto" by the measured rule, never so many that a worker idles. Runs over
    several workers are alone, and so are those with a budget of seconds: in a pack they would share them."""
    if experiment.scaling.distributed or experiment.budget.seconds is not None:
        return 1
    if pack != "auto":
        return pack
    task = experiment.task
    flops = experiment.model.flops_per_example(task.vocab_size, task.max_length, task.num_answers)
    batch = min(experiment.budget.batch_size, task.num_train or experiment.budget.batch_size)
    wanted = GPU_PACK if on_gpu else (CPU_PACK if flops * batch < DISPATCH_BOUND_FLOPS else 1)
    return max(1, min(wanted, -(-num_runs // num_workers)))


def make_packs(
    runs: Sequence[PlannedRun], num_workers: int, on_gpu: bool, pack: int | Literal["auto"]
) -> list[list[PlannedRun]]:
    """Runs of one shape together. A pure function of its arguments, so a resumed sweep forms the same packs."""
    groups: dict[str, list[PlannedRun]] = {}
    for run in unique_runs(runs):
        groups.setdefault(run.experiment.pack_key(), []).append(run)
    packs = []
    for group in groups.values():
        size = pack_size(group[0].experiment, len(group), num_workers, on_gpu, pack)
        packs += [group[start : start + size] for start in range(0, len(group), size)]
    # The costliest first, with what can start only after it, so that no long work is left for the end.
    after = _cost_after(runs)
    return sorted(packs, key=lambda members: -cost(members) - max(after.get(run.run_id, 0.0) for run in members))


def _cost_after(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Run id -> cost of the longest chain of runs that start from it, one after the other."""
    after: dict[str, float] = {}
    for run in reversed(runs):  # stages come after those that they start from
        for source in run.inputs.values():
            after[source] = max(after.get(source, 0.0), _cost(run.experiment) + after.get(run.run_id, 0.0))
    return after


def cost(runs: Sequence[PlannedRun]) -> float:
    """Work in FLOPs, for ordering and for the estimate of the time left."""
    return sum(_cost(run.experiment) for run in runs)


def _cost(e: Experiment) -> float:
    whole = flops_per_step(e) * e.budget.total
    return whole if e.budget.seconds is None else min(whole, e.budget.seconds * NOMINAL_FLOPS_PER_S)


def flops_per_step(e: Experiment) -> float:
    """Of forward and backward pass; the mean over the run where batches grow."""
    per_example = e.model.flops_per_example(e.task.vocab_size, e.task.max_length, e.task.num_answers)
    return 3 * per_example * e.budget.examples_per_step(e.task.num_train)
