"""The Ray actor that hosts a pack. One process trains pack after pack; what it must not lose is in run folders."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from filelock import FileLock
from ray import tune

from groundswell.rundir import SweepFolder

log = logging.getLogger(__name__)
REPORT_SECONDS = 2.0  # progress at most this often, when nobody waits for each evaluation
LOCK_SECONDS = 60.0  # a dying predecessor may hold its runs for a moment


class PackTrainable(tune.Trainable):
    """config: "sweep" (folder), "runs" (run ids of one pack), "every_evaluation" (bool, for schedulers)."""

    def setup(self, config: dict[str, Any]) -> None:
        from groundswell.training.trainer import PackTrainer  # torch, only where it computes

        self.sweep = SweepFolder(Path(config["sweep"]))
        _log_to_file(self.sweep.path / "log" / "workers.log")
        self.folders = [self.sweep.run(run_id) for run_id in config["runs"]]
        self.every_evaluation = bool(config["every_evaluation"])
        self.trainer: PackTrainer | None = None
        self.failure: list[dict[str, Any]] = []
        self.locks = contextlib.ExitStack()
        try:
            for folder in self.folders:
                self.locks.enter_context(FileLock(folder.path / "training.lock", timeout=LOCK_SECONDS))
            self.trainer = PackTrainer(self.folders)
        except Exception as error:  # a run's own failure is recorded; the sweep goes on
            self._record_failure(error)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        members = self.failure
        if self.trainer is not None:
            try:
                self._prune_requested()
                members = self.trainer.advance(REPORT_SECONDS, self.every_evaluation)
            except Exception as error:
                self._record_failure(error)
                members = self.failure
        return {"members": members, "done": self.trainer is None or self.trainer.finished}

    def _prune_requested(self) -> None:
        assert self.trainer is not None
        asked = {folder.run_id: reason for folder in self.folders if (reason := folder.prune_request())}
        if asked:
            self.trainer.prune(set(asked), next(iter(asked.values())))

    def _record_failure(self, error: Exception) -> None:
        """Every unfinished run of the pack is marked failed, with the traceback beside it."""
        self.trainer = None
        log.exception("pack failed")
        self.failure += [folder.fail(error) for folder in self.folders if not folder.status().is_final]

    def _leave(self) -> None:
        if self.trainer is not None:
            self.trainer.save_all()
            self.trainer = None
        self.locks.close()

    def cleanup(self) -> None:
        self._leave()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing for Tune to keep: runs checkpoint themselves."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Runs resume from their own folders in `setup`."""


def _log_to_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger("groundswell")
    if not any(isinstance(handler, logging.FileHandler) for handler in root.handlers):
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
