"""The experiment: one frozen tree that says everything about a run. Its hash is the run's identity."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from groundswell.budget import Budget
from groundswell.config import CLASS_KEY, Component, Config, hash_of
from groundswell.protocols import Model, Objective, Task
from groundswell.schedule import Every, LogSpaced, Schedule


class ParameterGroup(Config):
    """Tensors that are treated in a way of their own. What is not said is as for all others."""

    match: str = Field(description="regular expression that is found in the tensor's name; the first group wins")
    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    ascent: bool = Field(False, description="climb the loss instead (multipliers of a Lagrangian)")
    frozen: bool = Field(False, description="keep the initial values")

    @field_validator("match")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"'{value}' is not a regular expression ({error})") from None
        return value


class AdamW(Component):
    """AdamW with decoupled weight decay, linear warm-up, a schedule, and clipping by global norm.

    The trapezoid goes by the part f of the budget that is done, whether it counts steps or seconds: the rate rises
    linearly until f = warmup_fraction, and falls linearly to final_lr from f = 1 - cooldown_fraction on.
    """

    packable = frozenset({"lr", "weight_decay", "beta1", "beta2", "warmup_steps", "clip_norm"})

    lr: float = Field(1e-3, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices and embeddings")
    decay_all: bool = Field(False, description="decay biases and LayerNorms too, as plain torch.optim.AdamW does")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0, description="the s-th update (from 0) uses lr * min(1, s / warmup_steps)")
    clip_norm: float = Field(1.0, ge=0, description="largest global gradient norm; 0 is no clipping")
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = Field(
        "constant", description="of the rate after warm-up; all but constant reach final_lr at the end of the budget"
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="where the schedule ends, as a fraction of lr")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="trapezoid: part of the budget in which the rate rises")
    cooldown_fraction: float = Field(0.1, ge=0, le=1, description="trapezoid: part in which it falls, at the end")
    groups: tuple[ParameterGroup, ...] = Field((), description="tensors with settings of their own")

    @model_validator(mode="after")
    def _check_schedule(self) -> AdamW:
        if self.schedule == "trapezoid":
            if self.warmup_steps:
                raise ValueError("warmup_steps does not go with the trapezoid; set warmup_fraction instead")
            if self.warmup_fraction + self.cooldown_fraction > 1:
                raise ValueError("warmup_fraction and cooldown_fraction are more than 1 together; lower one of them")
        return self

    def lr_factor(self, update: int, total_updates: int, done: float | None = None) -> float:
        """What the learning rates are multiplied with in update number `update` (from 0). `done`: part of the budget,
        where that counts seconds."""
        if update < self.warmup_steps:
            return update / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        if done is None:
            done = (update - self.warmup_steps) / max(1, total_updates - self.warmup_steps)
        return self._trapezoid(done) if self.schedule == "trapezoid" else self._curve(min(1.0, done))

    def _curve(self, done: float) -> float:
        curve = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final_lr + (1.0 - self.final_lr) * curve

    def _trapezoid(self, done: float) -> float:
        if done < self.warmup_fraction:
            return done / self.warmup_fraction
        if done <= 1.0 - self.cooldown_fraction:
            return 1.0
        left = max(0.0, 1.0 - done) / self.cooldown_fraction if self.cooldown_fraction else 0.0
        return self.final_lr + (1.0 - self.final_lr) * left

    def group_of(self, name: str) -> int:
        """Which group a tensor belongs to: its place in `groups`, or len(groups) for those of no group."""
        matching = (index for index, group in enumerate(self.groups) if re.search(group.match, name))
        return next(matching, len(self.groups))

    def group_settings(self) -> list[ParameterGroup]:
        """Complete settings of each group, those of no group last."""
        rest = ParameterGroup(match="", lr=self.lr, weight_decay=self.weight_decay)
        return [
            ParameterGroup(
                match=group.match,
                lr=self.lr if group.lr is None else group.lr,
                weight_decay=self.weight_decay if group.weight_decay is None else group.weight_decay,
                ascent=group.ascent,
                frozen=group.frozen,
            )
            for group in self.groups
        ] + [rest]


class StopRule(Component, ABC):
    """Ends one run early. Looks only at that run's evaluation history, so a resumed run decides the same."""

    @abstractmethod
    def reason(self, history: Sequence[tuple[int, dict[str, float]]]) -> str | None:
        """Why the run should stop now, or None. `history` is (step, metrics) of every evaluation so far."""


class Reached(StopRule):
    """The metric was at least `value` in each of the last `evaluations` evaluations."""

    metric: str = Field(description="for instance eval/test_inferred_iid/accuracy")
    value: float = 0.99
    evaluations: int = Field(3, gt=0)

    def reason(self, history: Sequence[tuple[int, dict[str, float]]]) -> str | None:
        last = [metrics.get(self.metric, float("-inf")) for _, metrics in history[-self.evaluations :]]
        if len(last) == self.evaluations and min(last) >= self.value:
            return f"{self.metric} reached {self.value:g} in {self.evaluations} evaluations"
        return None


class NeverReached(StopRule):
    """The metric has not been at least `value` once by step `by_step`."""

    metric: str = Field(description="for instance eval/train_inferred/accuracy")
    value: float = 0.9
    by_step: int = Field(gt=0)

    def reason(self, history: Sequence[tuple[int, dict[str, float]]]) -> str | None:
        late = bool(history) and history[-1][0] >= self.by_step
        if late and all(metrics.get(self.metric, float("-inf")) < self.value for _, metrics in history):
            return f"{self.metric} below {self.value:g} by step {self.by_step}"
        return None


class Evaluation(Config):
    schedule: SerializeAsAny[Schedule] = LogSpaced()
    max_examples: int = Field(2_000, gt=0, description="the first so many examples of each split")
    batch_size: int = Field(2_048, gt=0)
    stop: tuple[SerializeAsAny[StopRule], ...] = ()


class Checkpointing(Config):
    schedule: SerializeAsAny[Schedule] = Every(every=1_000)
    keep: Literal["all", "last"] = Field("all", description="weights of every scheduled step, or of the last ones only")
    keep_last: int = Field(2, gt=0, description="how many of the newest are kept with keep=last")
    milestones: tuple[int, ...] = Field((), description="further steps, whose weights are always kept")
    best_metric: str = Field("", description="keep the weights of its best step too, for instance eval/iid/accuracy")
    best_mode: Literal["max", "min"] = "max"
    every_s: float = Field(120.0, gt=0, description="a state to go on from at least this often, at the next reading")


class Scaling(Config):
    """Where and how precisely one run computes, and over how many workers it is spread.

    single: in the process that hosts packs. The others run under Ray Train, one process a worker: ddp (a copy of the
    network each), fsdp (FSDP2: parameters, gradients and optimizer sharded by block), deepspeed (ZeRO 1, 2 or 3).
    """

    strategy: Literal["single", "ddp", "fsdp", "deepspeed"] = "single"
    num_workers: int = Field(1, gt=0, description="processes of one run (ddp, fsdp, deepspeed), one a GPU")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"
    num_threads: int = Field(1, gt=0, description="CPU threads of one worker; part of what makes a resume bit-exact")
    cpus_per_worker: float | None = Field(None, gt=0, description="what Ray reserves; default num_threads")
    micro_batch: int | None = Field(
        None, gt=0, description="examples in one forward pass of a worker; gradients accumulate over the batch"
    )
    zero_stage: Literal[1, 2, 3] = Field(2, description="of deepspeed: shard optimizer; + gradients; + parameters")
    activation_checkpointing: bool = Field(False, description="recompute each block in the backward pass")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="keep on the CPU: the optimizer (deepspeed), or parameters too (fsdp, deepspeed stage 3)"
    )
    timeout_s: float = Field(1_800.0, gt=0, description="a worker that is silent for longer counts as stuck")
    compile: bool = Field(False, description="torch.compile the loss (GPU)")
    cuda_graph: bool = Field(False, description="replay the whole step as one CUDA graph (GPU, no dropout)")

    # Another number of workers, or other reservations, goes on with the same run.
    not_identity: ClassVar[frozenset[str]] = frozenset({"num_workers", "cpus_per_worker", "timeout_s"})

    @property
    def distributed(self) -> bool:
        """Does the run need processes of its own?"""
        return self.strategy != "single"

    @property
    def reserved_cpus(self) -> float:
        """CPUs that Ray sets aside for one worker."""
        return self.num_threads if self.cpus_per_worker is None else self.cpus_per_worker

    @model_validator(mode="after")
    def _check_strategy(self) -> Scaling:
        if self.strategy == "single":
            if self.num_workers > 1:
                raise ValueError(f"num_workers {self.num_workers} needs strategy ddp, fsdp or deepspeed")
            if self.offload != "none" or self.activation_checkpointing:
                raise ValueError("strategy single has no offload and no activation_checkpointing; use fsdp")
        elif self.compile or self.cuda_graph:
            raise ValueError(f"strategy {self.strategy} does not go with compile or cuda_graph; leave them off")
        if self.strategy in ("fsdp", "deepspeed") and self.precision == "float64":
            raise ValueError(f"precision float64 does not go with strategy {self.strategy}; use single or ddp")
        if self.offload != "none":
            if self.strategy == "ddp":
                raise ValueError("offload does not go with ddp; use fsdp or deepspeed")
            if self.strategy == "fsdp" and self.offload == "optimizer":
                raise ValueError("offload optimizer alone is DeepSpeed's; fsdp offloads all")
            if self.strategy == "deepspeed" and self.offload == "all" and self.zero_stage != 3:
                raise ValueError("offload all needs zero_stage 3; stages 1 and 2 can offload the optimizer")
        return self

    @model_validator(mode="after")
    def _check(self) -> Scaling:
        if self.device == "cpu" and self.precision in ("tf32", "bf16"):
            raise ValueError(
                f"scaling.precision {self.precision} needs a GPU; on a CPU use float32, which is faster there"
            )
        if self.device == "cpu" and self.cuda_graph:
            raise ValueError("scaling.cuda_graph needs a GPU; leave it off or set scaling.device=cuda")
        return self


class Experiment(Config):
    task: SerializeAsAny[Task]
    model: SerializeAsAny[Model]
    objective: SerializeAsAny[Objective]
    optimizer: SerializeAsAny[AdamW] = AdamW()
    budget: Budget = Budget()
    metrics_every: int = Field(100, gt=0, description="steps between two readings of the training metrics")
    evaluation: Evaluation = Evaluation()
    checkpointing: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()
    seed: int = Field(0, ge=0, description="initial weights, data order and dropout; the task has its own seed")

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        self.model.check(self.task)
        self.objective.check(self)
        if self.budget.batch_ramp is not None:
            if (self.scaling.micro_batch or self.budget.batch_size) >= self.budget.batch_size:
                raise ValueError("budget.batch_ramp: grows by micro-batches; set scaling.micro_batch below batch_size")
            if self.scaling.cuda_graph:
                raise ValueError("budget.batch_ramp: does not go with scaling.cuda_graph; leave that off")
        if self.scaling.distributed and type(self.model).network is Model.network:
            name = type(self.model).__name__
            raise ValueError(
                f"scaling.strategy {self.scaling.strategy}: {name} cannot be spread over workers; use single"
            )
        return self

    @property
    def identity(self) -> str:
        """sha256 of what decides the result: the whole tree but for what `Scaling.not_identity` names."""
        return identity_of(self.to_dict())

    @property
    def run_id(self) -> str:
        """Short name of the identity: folder and artifact names."""
        return self.identity[:12]

    def saves(self, step: int) -> bool:
        """Is a checkpoint due after `step`?"""
        c = self.checkpointing
        return step == self.budget.total or step in c.milestones or (step > 0 and c.schedule.due(step))

    def stays(self, step: int) -> bool:
        """Is the checkpoint of `step` never thinned out?"""
        c = self.checkpointing
        return step == self.budget.total or step in c.milestones or (c.keep == "all" and c.schedule.due(step))

    def pack_key(self) -> str:
        """Runs with equal keys can train as one program: everything but the packable fields."""
        values = self.to_dict() | {"seed": None}
        for name in type(self).model_fields:
            part = getattr(self, name)
            if isinstance(part, Component):
                values[name] = {k: v for k, v in values[name].items() if k == CLASS_KEY or k not in part.packable}
        if not self.optimizer.decay_all:  # with it, tensors of equal settings are updated as one
            groups = values["optimizer"]["groups"]
            values["optimizer"]["groups"] = [group | {"lr": None, "weight_decay": None} for group in groups]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))


def identity_of(values: dict[str, Any]) -> str:
    """The identity of an experiment that is given as plain values."""
    scaling = {name: value for name, value in values["scaling"].items() if name not in Scaling.not_identity}
    budget, optimizer = dict(values["budget"]), dict(values["optimizer"])
    # What is not used is left out, so that runs made before there were such fields keep their identity.
    for name in ("seconds", "batch_ramp"):
        if budget.get(name) is None:
            budget.pop(name, None)
    if optimizer.get("schedule") != "trapezoid":
        for name in ("warmup_fraction", "cooldown_fraction"):
            optimizer.pop(name, None)
    return hash_of(values | {"scaling": scaling, "budget": budget, "optimizer": optimizer})
