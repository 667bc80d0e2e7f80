"""The experiment: one frozen tree that says everything about a run. Its hash is the run's identity."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from groundswell.config import CLASS_KEY, Component, Config
from groundswell.protocols import Model, Objective, Task
from groundswell.schedule import Every, LogSpaced, Schedule


class AdamW(Component):
    """AdamW with decoupled weight decay, linear warm-up, then a constant rate, and clipping by global norm."""

    packable = frozenset({"lr", "weight_decay", "beta1", "beta2", "warmup_steps", "clip_norm"})

    lr: float = Field(1e-3, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices and embeddings")
    decay_all: bool = Field(False, description="decay biases and LayerNorms too, as plain torch.optim.AdamW does")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0, description="the s-th update (from 0) uses lr * min(1, s / warmup_steps)")
    clip_norm: float = Field(1.0, ge=0, description="largest global gradient norm; 0 is no clipping")


class Budget(Config):
    """How long a run is. With `epochs`, one step of the run is an epoch: metrics_every, the schedules, stop rules and
    every step number count epochs then (warm-up still counts updates), and an epoch ends with a short batch."""

    steps: int = Field(1_000, gt=0, description="updates; batches run on across epochs, so all are full")
    epochs: int | None = Field(None, gt=0, description="passes over the training data, in place of steps")
    batch_size: int = Field(512, gt=0, description="examples an update")

    @property
    def total(self) -> int:
        """Steps of the whole run: updates, or epochs."""
        return self.epochs or self.steps

    @property
    def unit(self) -> str:
        return "epoch" if self.epochs else "step"

    def examples_per_step(self, num_train: int | None) -> int:
        """`num_train` None: unknown, one batch is taken for an epoch."""
        return num_train if self.epochs and num_train else self.batch_size


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
    keep: Literal["all", "last"] = Field("all", description="weights of every scheduled step, or of the last two only")


class Scaling(Config):
    """Where and how precisely one run computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"
    num_threads: int = Field(1, gt=0, description="CPU threads of one run; part of what makes a resume bit-exact")
    compile: bool = Field(False, description="torch.compile the loss (GPU)")
    cuda_graph: bool = Field(False, description="replay the whole step as one CUDA graph (GPU, no dropout)")

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
        return self

    @property
    def run_id(self) -> str:
        """Short name of the identity: folder and artifact names."""
        return self.identity[:12]

    def pack_key(self) -> str:
        """Runs with equal keys can train as one program: everything but the packable fields."""
        values = self.to_dict() | {"seed": None}
        for name in type(self).model_fields:
            part = getattr(self, name)
            if isinstance(part, Component):
                values[name] = {k: v for k, v in values[name].items() if k == CLASS_KEY or k not in part.packable}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))
