"""Early stopping across runs: Ray Tune's schedulers, asked about each member of a pack instead of each Tune trial."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from groundswell.rundir import RunFolder
from groundswell.tuning import Unsaved

log = logging.getLogger(__name__)
SchedulerName = Literal["none", "asha", "median"]
REDUCTION_FACTOR = 3  # ASHA (Li et al. 2020) uses 3 or 4
GRACE_FRACTION = 1 / 9  # no run is judged before this part of its budget: two factors of three below the end


@dataclass(frozen=True)
class MemberProxy:
    """What Tune's schedulers need to know of a trial."""

    trial_id: str


def make_scheduler(name: SchedulerName, metric: str, mode: str, total_steps: int) -> TrialScheduler | None:
    grace = max(1, round(total_steps * GRACE_FRACTION))
    if name == "asha":
        return AsyncHyperBandScheduler(
            time_attr="step", metric=metric, mode=mode, max_t=total_steps, grace_period=grace,
            reduction_factor=REDUCTION_FACTOR, stop_last_trials=False,
        )  # fmt: skip
    if name == "median":
        return MedianStoppingRule(
            time_attr="step", metric=metric, mode=mode, grace_period=grace,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # never pause a run for want of rivals
        )  # fmt: skip
    return None


class MemberScheduler(Unsaved, FIFOScheduler):
    """Feeds each run's evaluations to `inner`; a run that should stop finds a request in its folder.

    The decision is on disk before the pack goes on, so it survives a crash. The evaluations of earlier sessions are
    replayed, so that a resumed sweep judges by the same record.
    """

    def __init__(
        self, inner: TrialScheduler, request_prune: Callable[[str, str], None], earlier: Iterable[RunFolder] = ()
    ) -> None:
        """`request_prune` (run id, reason) writes the request; `earlier`: runs that have evaluations already."""
        super().__init__()
        self.inner = inner
        self.request_prune = request_prune
        self._proxies: dict[str, MemberProxy] = {}
        self._judged: dict[str, int] = {}  # run id -> step
        self._stopped: set[str] = set()
        self._recall(earlier)

    def _recall(self, folders: Iterable[RunFolder]) -> None:
        lines = [(line["time_ms"], folder.run_id, line) for folder in folders for line in folder.journal()]
        for _, run_id, line in sorted(lines, key=lambda item: item[:2]):
            self._judge(None, run_id, {"step": line["step"], **line["metrics"]})

    def _judge(self, controller: Any, run_id: str, result: Mapping[str, Any]) -> bool:
        """Should this run stop?"""
        if run_id not in self._proxies:
            self._proxies[run_id] = MemberProxy(run_id)
            self.inner.on_trial_add(controller, self._proxies[run_id])  # type: ignore[arg-type]
        step = result.get("step", 0)
        if step <= self._judged.get(run_id, 0):  # a retried actor reports some steps twice
            return False
        self._judged[run_id] = step
        if run_id in self._stopped:  # schedulers do not expect to hear of it again
            return True
        action = self.inner.on_trial_result(controller, self._proxies[run_id], dict(result))  # type: ignore[arg-type]
        if action == TrialScheduler.STOP:
            self._stopped.add(run_id)
        return run_id in self._stopped

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        for member in result.get("members", ()):
            if member["state"] == "running" and self._judge(tune_controller, member["run_id"], member):
                self.request_prune(member["run_id"], f"behind its rivals at step {member['step']}")
        return TrialScheduler.CONTINUE
