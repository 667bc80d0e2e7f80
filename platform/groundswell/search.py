"""Where packs come from: a fixed list (grid, random), or Optuna's study on disk, asked and told in groups."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ray.tune.search import Searcher

from groundswell.config import ConfigError
from groundswell.sweep import PlannedRun, Sweep
from groundswell.tuning import Unsaved

SearchName = Literal["grid", "random", "optuna"]
Packer = Callable[[Sequence[PlannedRun]], list[list[PlannedRun]]]
Outcome = Mapping[str, Any]  # "state", "values" (of the sweep's objectives at the last evaluation, or None), "step"


class PackSource(ABC):
    """Hands out packs and hears how their runs ended."""

    @abstractmethod
    def next_pack(self) -> list[PlannedRun] | None:
        """None when there are no more; an empty one where the next must wait for runs that are under way."""

    def complete(self, run_id: str, outcome: Outcome) -> None:  # noqa: B027 (only a learning source listens)
        """A run has reached a final state."""


class ListedPacks(PackSource):
    """Everything is known from the start."""

    def __init__(self, packs: Sequence[Sequence[PlannedRun]]) -> None:
        self._waiting = deque(list(pack) for pack in packs)

    def next_pack(self) -> list[PlannedRun] | None:
        return self._waiting.popleft() if self._waiting else None


class InOrder(PackSource):
    """Holds packs back until the runs that theirs start from have ended; the source has those too. A run that several
    settings share is handed out once."""

    def __init__(self, source: PackSource) -> None:
        self._source = source
        self._held: list[list[PlannedRun]] = []
        self._open: set[str] = set()  # runs that came from the source and have not ended
        self._ended: set[str] = set()

    def next_pack(self) -> list[PlannedRun] | None:
        for pack in self._held:
            if self._is_ready(pack):
                self._held.remove(pack)
                return pack
        while (asked := self._source.next_pack()) is not None:
            pack = [run for run in asked if run.run_id not in self._open]  # settings share runs
            self._open.update(run.run_id for run in pack)
            if pack and self._is_ready(pack):
                return pack
            self._held += [pack] if pack else []
        return [] if self._held else None

    def _is_ready(self, pack: Sequence[PlannedRun]) -> bool:
        return all(source in self._ended for run in pack for source in run.inputs.values())

    def complete(self, run_id: str, outcome: Outcome) -> None:
        self._open.discard(run_id)
        self._ended.add(run_id)
        self._source.complete(run_id, outcome)


class OptunaPacks(PackSource):
    """TPE over the sweep's axes. The study on disk is the truth: a new driver finds its open trials and goes on.

    One Optuna trial is one setting; its values are means over the replicates. Trials are asked in groups large
    enough to fill a pack, with constant liar so that a group spreads out.
    """

    def __init__(self, sweep: Sweep, storage: Path, num_samples: int, pack: Packer, group: int, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.num_samples, self.pack, self.group = sweep, num_samples, pack, group
        self._distributions = {path: _distribution(path, axis) for path, axis in sweep.search_axes().items()}
        if not self._distributions:
            raise ConfigError(
                "search optuna: the sweep has no axis besides its replicates; add one with --axis PATH=V1,V2"
            )
        storage.parent.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            study_name=sweep.name,
            storage=f"sqlite:///{storage}",
            directions=["maximize" if mode == "max" else "minimize" for mode in sweep.objectives.values()],
            load_if_exists=True,
        )
        # A fresh seed for each continuation, a pure function of what is already known.
        known = len(self.study.trials)
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + known, multivariate=True, constant_liar=True)
        self._states = optuna.trial.TrialState
        self._waiting: deque[list[PlannedRun]] = deque()
        self._open: dict[int, dict[str, Outcome | None]] = {}  # trial number -> run id -> outcome
        self._decisive: set[str] = set()
        self._reopen()

    def _reopen(self) -> None:
        """Settings that an earlier driver asked for and never told: train on. Half-asked ones: forget."""
        runs: list[PlannedRun] = []
        for trial in self.study.trials:
            if trial.state == self._states.RUNNING:
                if set(trial.params) == set(self._distributions):
                    runs += self._register(trial.number, trial.params)
                else:
                    self.study.tell(trial.number, state=self._states.FAIL)
        self._waiting.extend(self.pack(runs))

    def _register(self, number: int, params: Mapping[str, Any]) -> list[PlannedRun]:
        runs = self.sweep.runs({path: params[path] for path in self._distributions})
        self._open[number] = {run.run_id: None for run in runs}
        self._decisive |= {run.run_id for run in runs if run.decisive}
        return runs

    def _asked(self) -> int:
        """Settings that were drawn whole, whatever became of them."""
        return sum(set(trial.params) == set(self._distributions) for trial in self.study.get_trials(deepcopy=False))

    def next_pack(self) -> list[PlannedRun] | None:
        while not self._waiting:
            count = min(self.group, self.num_samples - self._asked())
            if count <= 0:
                return None
            runs = []
            for _ in range(count):
                trial = self.study.ask(self._distributions)
                runs += self._register(trial.number, trial.params)
            self._waiting.extend(self.pack(runs))
        return self._waiting.popleft()

    def complete(self, run_id: str, outcome: Outcome) -> None:
        """Tell the study once all replicates of a setting have ended (settings drawn twice share their runs)."""
        for number, runs in list(self._open.items()):
            if run_id in runs:
                runs[run_id] = outcome
                if all(runs.values()):
                    self._tell(number, [o for one, o in runs.items() if o and one in self._decisive])
                    del self._open[number]

    def _tell(self, number: int, outcomes: Sequence[Outcome]) -> None:
        values = [value for o in outcomes for value in o["values"]]
        whole = all(value is not None and math.isfinite(value) for value in values)
        if not whole or any(o["state"] == "failed" for o in outcomes):
            self.study.tell(number, state=self._states.FAIL)
        else:
            columns = zip(*(o["values"] for o in outcomes), strict=True)
            self.study.tell(number, [sum(column) / len(outcomes) for column in columns])


def _distribution(path: str, axis: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.low is not None:
        if axis.integer:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return FloatDistribution(axis.low, axis.high, log=axis.log)
    if not all(isinstance(value, str | int | float | bool | None) for value in axis.values):
        raise ConfigError(f"{path}: Optuna can choose between numbers, texts and booleans only")
    return CategoricalDistribution(axis.values)


class PackSearcher(Unsaved, Searcher):
    """Gives a PackSource's packs to Ray Tune as the configs of its trials."""

    def __init__(self, source: PackSource, prepare: Callable[[list[PlannedRun]], dict[str, Any] | None]) -> None:
        """`prepare` makes the run folders and returns the trial's config; None where nothing is left to do."""
        super().__init__()
        self.source, self.prepare = source, prepare

    def suggest(self, trial_id: str) -> Any:
        while (pack := self.source.next_pack()) is not None:
            if not pack:
                return None  # Tune asks again
            if config := self.prepare(pack):
                return config
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """The driver's callback sees every run's end; nothing to do here."""

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """The truth is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a resumed sweep builds a new searcher")
