"""The account of what is asked of checkpoints: which jobs there were, what follows on each, what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from groundswell.probe_pool import Job, Key
from groundswell.probes import Probe, is_over_time_due
from groundswell.rundir import RunFolder


@dataclass(frozen=True)
class Failure:
    run: RunFolder
    step: int | None
    reason: str

    def __str__(self) -> str:
        where = "" if self.step is None else f" step {self.step}"
        return f"not probed: {self.run.description()['name']} ({self.run.run_id}){where}: {self.reason}"


class Asking:
    """Keeps count: which jobs there were, what is left of each checkpoint and each run, what failed."""

    def __init__(self, answered: Callable[[Job], None], looks_over_time: bool = True) -> None:
        self._answered = answered  # told of each job that has ended
        self.looks_over_time = looks_over_time  # once nothing is left of a run
        self.failures: dict[Key, list[Failure]] = {}
        self.num_answered = 0  # checkpoints
        self.num_ended = 0  # jobs of checkpoints
        self._taken: dict[Key, Job] = {}
        self._parts_left: Counter[Key] = Counter()  # by the job that joins them
        self._jobs_left: Counter[tuple[Path, int | None]] = Counter()  # by checkpoint
        self._steps_left: dict[Path, set[int]] = {}  # by run
        self._probes: dict[Path, dict[str, Probe]] = {}  # by run, by name

    @property
    def num_failed(self) -> int:
        """Jobs of checkpoints with a failure."""
        return sum(step is not None for _, step, *_ in self.failures)

    @property
    def num_left(self) -> int:
        """Jobs of checkpoints that have not ended."""
        return sum(self._jobs_left.values()) + sum(self._parts_left.values())

    def is_new(self, run: RunFolder, step: int | None) -> bool:
        return (run.path.resolve(), step) not in self._jobs_left

    def take(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that are new; a divided question's parts in place of the whole, which follows them."""
        found: list[Job] = []
        for job in jobs:
            if job.key in self._taken:
                continue
            self._taken[job.key] = job
            self._probes.setdefault(job.run.path, {}).update({probe.name(): probe for probe in job.probes})
            if job.step is not None:
                self._jobs_left[job.checkpoint] += 1
                self._steps_left.setdefault(job.run.path, set()).add(job.step)
                self._parts_left[job.key] = len(job.parts)
            found += job.part_jobs() or [job]
        return found

    def finished(self, job: Job, troubles: list[str]) -> list[Job]:
        """Returns the job that follows: after the last part the whole question; once the last checkpoint of a run is
        done, its answers together."""
        if troubles:
            self.failures[job.key] = [Failure(job.run, job.step, text) for text in troubles]
        self._answered(job)
        if job.step is None:
            return []
        self.num_ended += 1
        if job.part is None:
            return self._checkpoint_follows(job)
        whole = self._taken[*job.key[:3], ""]
        self._parts_left[whole.key] -= 1
        if self._parts_left[whole.key]:
            return []
        if not any(key[:3] == whole.key[:3] for key in self.failures):
            return [whole]
        self.num_ended += 1
        return self._checkpoint_follows(whole)

    def _checkpoint_follows(self, job: Job) -> list[Job]:
        """A job that was a whole one has ended."""
        self._jobs_left[job.checkpoint] -= 1
        if self._jobs_left[job.checkpoint]:
            return []
        self.num_answered += not any(key[:2] == job.checkpoint for key in self.failures)
        steps_left, asked = self._steps_left[job.run.path], tuple(self._probes[job.run.path].values())
        steps_left -= {job.step}
        due = self.looks_over_time and not steps_left and any(is_over_time_due(job.run, probe) for probe in asked)
        return [replace(job, step=None, probes=asked, parts=())] if due else []

    def forget_failures(self) -> None:
        """They may be asked again."""
        for key in self.failures:
            self._taken.pop((*key[:3], ""), None)
        self.failures = {}

    def all_failures(self) -> list[Failure]:
        """In the order of runs and steps; what is over time comes last."""
        order = sorted(self.failures, key=lambda key: (str(key[0]), key[1] is None, *key[1:]))
        return [failure for key in order for failure in self.failures[key]]
