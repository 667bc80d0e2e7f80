"""How long a run is: updates, epochs or seconds."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from groundswell.config import Config

ENDLESS = 10**9  # updates: more than any clock allows


class Budget(Config):
    """How long a run is. With `epochs`, one step of the run is an epoch: metrics_every, the schedules, stop rules and
    every step number count epochs then (warm-up still counts updates), and an epoch ends with a short batch.

    With `seconds`, a run ends after the update in which they are over. What counts is the time of making batches and
    updating, summed over resumes; evaluations, checkpoints and starting up do not, so that a run that is looked at more
    often trains no less. Learning rates and batch sizes follow the clock, so that no two such runs are equal.
    """

    steps: int | None = Field(1_000, gt=0, description="updates (default: any number beside seconds)")
    epochs: int | None = Field(None, gt=0, description="passes over the training data, in place of steps")
    seconds: float | None = Field(None, gt=0, description="of training; steps is the most updates then")
    batch_size: int = Field(512, gt=0, description="examples an update; batches run on across epochs, so all are full")
    batch_ramp: float | None = Field(
        None, gt=0, le=1, description="part of the budget in which batches grow from one scaling.micro_batch to all"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_default_cap(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("seconds") is not None and "steps" not in values:
            return values | {"steps": None}
        return values

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.steps is None and self.seconds is None and self.epochs is None:
            raise ValueError("steps is not set; give steps, epochs or seconds")
        if self.epochs and self.seconds:
            raise ValueError("seconds does not go with epochs; set one of them")
        if self.epochs and self.batch_ramp:
            raise ValueError("batch_ramp does not go with epochs; set steps or seconds instead")
        return self

    @property
    def total(self) -> int:
        """Most steps of the whole run: updates, or epochs."""
        return self.epochs or self.steps or ENDLESS

    def done(self, step: int, elapsed: float) -> float:
        """Which part of the budget is done after `step` and so many seconds of training."""
        return step / self.total if self.seconds is None else elapsed / self.seconds

    def is_over(self, step: int, elapsed: float) -> bool:
        return step >= self.total or (self.seconds is not None and elapsed >= self.seconds)

    def ramped_batch(self, done: float, micro_batch: int | None) -> int:
        """Examples of an update when this part of the budget is done: whole micro-batches, as in the code of McLeish
        et al. 2024 (arXiv 2405.17399); but several workers share the first micro-batch, so their number is no matter.
        """
        if self.batch_ramp is None or micro_batch is None:
            return self.batch_size
        grown = done * self.batch_size / self.batch_ramp
        return min(int(grown // micro_batch + 1) * micro_batch, self.batch_size)

    @property
    def unit(self) -> str:
        return "epoch" if self.epochs else "step"

    def examples_per_step(self, num_train: int | None) -> int:
        """On average. `num_train` None: unknown, one batch is taken for an epoch."""
        if self.batch_ramp is not None:
            return max(1, round(self.batch_size * (1.0 - 0.5 * self.batch_ramp)))
        return num_train if self.epochs and num_train else self.batch_size
