"""Small adapters between Ray Tune and the driver."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

if TYPE_CHECKING:
    from groundswell.driver import Driver


class Unsaved:
    """Tune pickles its parts for Tuner.restore. A resumed sweep builds new ones from what is on disk, so this pickles
    to an empty shell instead of dragging the driver's threads and files along."""

    def __reduce__(self) -> tuple:
        return (Unsaved, ())


class InterruptStopper(Unsaved, Stopper):
    """Ends all trials in an orderly way once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()


class RunEnds(Unsaved, Callback):
    """Passes members' reports and lost processes on to the driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any) -> None:
        self._driver.on_members(result.get("members", ()))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._driver.on_trial_lost(trial.config["runs"], "worker process died, and died again after each retry")
