"""Training of a pack against its run folders: readings, evaluations, checkpoints, early stops, resume.

All moments but the end of a budget of seconds are functions of the step, so a run that is killed and resumed does the
same things at the same steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from groundswell.rundir import RunFolder
from groundswell.training import checkpoint
from groundswell.training.pack import Member, Pack, resolve_device
from groundswell.training.run import TRAINING_SECONDS, Ending, Run

log = logging.getLogger(__name__)


class PackTrainer:
    """Trains the unfinished runs of one pack from their newest common checkpoint."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self.runs = [Run(folder, folder.experiment()) for folder in folders if not folder.status().is_final]
        self.pack: Pack | None = None
        self._failed: list[dict[str, Any]] = []  # reports of runs that could not start
        if not self.runs:
            return
        first = self.runs[0].experiment
        torch.set_num_threads(first.scaling.num_threads)
        self.total, self.unit = first.budget.total, first.budget.unit
        members = self._create_members(resolve_device(first.scaling))
        if not members:
            return
        self.pack = Pack(members)
        self._resume()
        now = _now_ms()
        for run in self.runs:
            run.folder.update_status(
                state="running", step=self.pack.step_count, started_ms=run.folder.status().started_ms or now
            )
        self._last_checkpoint = self._last_reading = time.monotonic()
        self._last_step = self.pack.step_count
        if self.runs[0].is_over(self._last_step):  # cut off after its last checkpoint
            for run in self.runs:
                self._end(run, "finished", None, self._last_step)
            self._keep([])

    def _create_members(self, device: torch.device) -> list[Member]:
        """A run whose data cannot be made fails alone; the others of its pack go on."""
        members, able = [], []
        for run in self.runs:
            try:
                members.append(Member.create(run.experiment, device))
                able.append(run)
            except Exception as error:
                log.exception("run %s cannot start", run.folder.run_id)
                self._failed.append(run.folder.fail(error))
        self.runs = able
        return members

    # ---- resume ----

    def _resume(self) -> None:
        """Go on from the newest step at which every member has a whole checkpoint, else from the beginning."""
        assert self.pack is not None
        common: set[int] | None = None
        for run in self.runs:
            steps = set(checkpoint.resumable_steps(run.folder.checkpoints, run.experiment))
            common = steps if common is None else common & steps
        step = max(common or {0})
        for row, run in enumerate(self.runs):
            run.rewind(step if common else -1)
            if common:
                self.pack.load_member_state(
                    row, *checkpoint.load_training(run.folder.checkpoints, step, run.experiment)
                )
                run.saved_step = step
        if common:
            self.pack.set_step(step)
        for run in self.runs:
            run.elapsed = self.pack.watch.elapsed
        self._fresh = not common

    # ---- the loop ----

    @property
    def finished(self) -> bool:
        return not self.runs

    def advance(self, min_seconds: float = 0.0, every_evaluation: bool = False) -> list[dict[str, Any]]:
        """Train on until something is worth reporting: all done, `min_seconds` over, or (asked for) an evaluation.

        Returns one report a run: {"run_id", "step", "state", metrics...}.
        """
        start = time.monotonic()
        reports = {report["run_id"]: report for report in self._failed}
        self._failed = []
        while self.runs:
            evaluated = self._advance_once(reports)
            if (every_evaluation and evaluated) or time.monotonic() - start >= min_seconds:
                break
        return list(reports.values())

    def _advance_once(self, reports: dict[str, dict[str, Any]]) -> bool:
        """Train to the next event and do what is due there. Returns whether there was an evaluation."""
        pack, first = self._current_pack(), self.runs[0]
        if self._fresh and pack.step_count == 0:
            self._fresh, step = False, 0  # evaluation of the untrained model
        else:
            step = first.next_event(pack.step_count)
            pack.train(step - pack.step_count)
            step = pack.step_count  # sooner where a budget of seconds is over
        for run in self.runs:
            run.elapsed = pack.watch.elapsed
        metrics = self._read(pack)
        evaluates = first.evaluates(step)
        if evaluates:
            for mine, more in zip(metrics, pack.evaluate(), strict=True):
                mine.update(more)
        self._journal(step, metrics, evaluates, reports)
        endings = [run.ending(step, mine) for run, mine in zip(self.runs, metrics, strict=True)]
        self._save_due(step, endings)
        for run, (state, reason) in zip(list(self.runs), endings, strict=True):
            if state != "running":
                self._end(run, state, reason, step)
                reports[run.folder.run_id].update(state=state)
        self._keep([row for row, (state, _) in enumerate(endings) if state == "running"])
        return evaluates

    def _current_pack(self) -> Pack:
        assert self.pack is not None
        return self.pack

    def _read(self, pack: Pack) -> list[dict[str, float]]:
        metrics = pack.read_metrics()  # waits for the device: the clock is read after it
        now = time.monotonic()
        if pack.step_count > self._last_step:
            rate = (pack.step_count - self._last_step) / max(now - self._last_reading, 1e-9)
            for mine in metrics:
                mine[f"perf/{self.unit}s_per_s"] = rate
        for mine in metrics:
            mine[TRAINING_SECONDS] = pack.watch.elapsed
        self._last_reading, self._last_step = now, pack.step_count
        return metrics

    def _journal(
        self, step: int, metrics: list[dict[str, float]], evaluated: bool, reports: dict[str, dict[str, Any]]
    ) -> None:
        for run, mine in zip(self.runs, metrics, strict=True):
            finite = run.record(step, mine, evaluated)
            report = reports.setdefault(run.folder.run_id, {"run_id": run.folder.run_id})
            report.update(finite, step=step, state="running")

    # ---- checkpoints and endings ----

    def _save_due(self, step: int, endings: Sequence[Ending]) -> None:
        """Scheduled, at the end of a run, and by the clock; a diverged run keeps its last good one."""
        scheduled = self.runs[0].experiment.saves(step)
        by_clock = time.monotonic() - self._last_checkpoint >= self.runs[0].experiment.checkpointing.every_s
        for row, (state, _) in enumerate(endings):
            if state != "diverged" and (scheduled or by_clock or state != "running"):
                self._save(row)
        if scheduled or by_clock:
            self._last_checkpoint = time.monotonic()

    def _save(self, row: int) -> None:
        pack, run = self._current_pack(), self.runs[row]
        if run.saved_step == pack.step_count:
            return
        run.folder.sync_journal()  # the journal must reach at least as far as the checkpoint
        checkpoint.save(
            run.folder.checkpoints,
            pack.step_count,
            run.experiment,
            {name: tensor.cpu() for name, tensor in pack.parameters.row(row).items()},
            pack.members[row].dataset.vocabulary,
            pack.member_state(row),
        )
        checkpoint.thin_out(run)
        run.saved_step = pack.step_count

    def _end(self, run: Run, state: str, reason: str | None, step: int) -> None:
        run.folder.sync_journal()
        run.folder.update_status(state=state, step=step, reason=reason, ended_ms=_now_ms())

    def _keep(self, alive: Sequence[int]) -> None:
        """Go on with these members only."""
        if len(alive) == len(self.runs):
            return
        self.runs = [self.runs[row] for row in alive]
        self.pack = self._current_pack().subset(alive) if alive else None

    def prune(self, run_ids: set[str], reason: str) -> None:
        """A scheduler's decision: end these runs here, keeping their state."""
        asked = [run.folder.run_id in run_ids for run in self.runs]
        for row, run in enumerate(self.runs):
            if asked[row]:
                self._save(row)
                self._end(run, "pruned", reason, self._current_pack().step_count)
        self._keep([row for row, ends in enumerate(asked) if not ends])

    def save_all(self) -> None:
        """A resumable state now: on Ctrl-C and before a worker goes away. Before the first step there is none: who went
        on from it would take the untrained model's evaluation for done."""
        if self.runs and self._current_pack().step_count > 0:
            for row in range(len(self.runs)):
                self._save(row)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
