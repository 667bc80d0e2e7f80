"""One run as its trainer sees it: its folder, its history, what is due when, and how it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from groundswell.experiment import Experiment
from groundswell.rundir import RunFolder, State

TRAINING_SECONDS = "perf/training_s"  # of readings: how long the run has trained
Ending = tuple[State, str | None]  # the state a run is in after a step, and why


@dataclass
class Run:
    """A run's files and its evaluations so far. All moments but the end of a budget of seconds are functions of the
    step."""

    folder: RunFolder
    experiment: Experiment
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # evaluations, for the stop rules
    saved_step: int = -1
    elapsed: float = 0.0  # seconds of training so far

    def is_over(self, step: int) -> bool:
        return self.experiment.budget.is_over(step, self.elapsed)

    def next_event(self, step: int) -> int:
        """The next step after `step` at which something is read, evaluated or saved."""
        e = self.experiment
        for candidate in range(step + 1, e.budget.total):
            if candidate % e.metrics_every == 0 or self.evaluates(candidate) or e.saves(candidate):
                return candidate
        return e.budget.total

    def evaluates(self, step: int) -> bool:
        return self.is_over(step) or self.experiment.evaluation.schedule.due(step)

    def kept_steps(self, steps: Sequence[int]) -> set[int]:
        """Which of these checkpoints stay: by plan, the newest, and the best one so far."""
        c = self.experiment.checkpointing
        saved = [step for step in sorted(steps) if self.experiment.saves(step)]
        kept = {step for step in steps if self.experiment.stays(step)} | set(saved[-c.keep_last :])
        values = {step: metrics[c.best_metric] for step, metrics in self.history if c.best_metric in metrics}
        rated = [step for step in saved if step in values]
        if rated:
            best = max if c.best_mode == "max" else min
            kept.add(best(rated, key=lambda step: values[step]))
        return kept

    def rewind(self, step: int) -> None:
        """Forget what the folder says beyond `step` (-1: everything), and read the evaluations before it."""
        self.folder.truncate_journal(step)
        self.history = [
            (line["step"], _evaluations(line["metrics"]))
            for line in self.folder.journal()
            if _evaluations(line["metrics"])
        ]

    def record(self, step: int, metrics: Mapping[str, float], evaluated: bool) -> dict[str, float]:
        """Append to the journal. Returns what was written: the finite ones."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.folder.append_metrics(step, finite)
        if evaluated:
            self.history.append((step, _evaluations(finite)))
        return finite

    def ending(self, step: int, metrics: Mapping[str, float]) -> Ending:
        """The state this run is in after `step`, and why."""
        budget = self.experiment.budget
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            remedy = "lower optimizer.lr or set optimizer.clip_norm"
            return "diverged", f"{bad[0]} is not finite at {budget.unit} {step}; {remedy}"
        if self.is_over(step):
            return "finished", None
        if self.history and self.history[-1][0] == step:
            for rule in self.experiment.evaluation.stop:
                if reason := rule.reason(self.history):
                    return "stopped", reason
        return "running", None


def seconds_trained(folder: RunFolder) -> float:
    """By the newest reading."""
    return next(
        (m[TRAINING_SECONDS] for line in reversed(folder.journal()) if TRAINING_SECONDS in (m := line["metrics"])), 0.0
    )


def _evaluations(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("eval/")}
