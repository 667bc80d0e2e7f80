"""The Ray actor that hosts a pack, or follows the workers of a run that is spread over several processes.

One process trains pack after pack; what it must not lose is in run folders.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from ray import tune

from groundswell.rundir import RunFolder, SweepFolder

if TYPE_CHECKING:
    from groundswell.mirror import Mirror
    from groundswell.scaling.session import TrainSession
    from groundswell.training.trainer import PackTrainer

log = logging.getLogger(__name__)
REPORT_SECONDS = 2.0  # progress at most this often, when nobody waits for each evaluation
LOCK_SECONDS = 60.0  # a dying predecessor may hold its runs for a moment


class PackTrainable(tune.Trainable):
    """config: "sweep" (folder), "runs" (run ids of one pack), "every_evaluation" (bool, for schedulers), "reserves"
    (Ray's resources of this process), "storage" (URI of what outlives this machine), "inputs" (ids of the runs that
    these start from)."""

    def setup(self, config: dict[str, Any]) -> None:
        self.sweep = SweepFolder(Path(config["sweep"]))
        self.log_file = self.sweep.path / "log" / "workers.log"
        log_to_file(self.log_file)
        self.folders = [self.sweep.run(run_id) for run_id in config["runs"]]
        self.every_evaluation = bool(config["every_evaluation"])
        self.trainer: PackTrainer | None = None
        self.session: TrainSession | None = None
        self.mirror: Mirror | None = None
        self.failure: list[dict[str, Any]] = []
        self.locks = contextlib.ExitStack()
        try:
            if config.get("storage"):
                self.mirror = open_mirror(config["storage"], self.folders, config.get("inputs", ()))
            for folder in self.folders:
                self.locks.enter_context(FileLock(folder.path / "training.lock", timeout=LOCK_SECONDS))
            self._start()
        except Exception as error:  # a run's own failure is recorded; the sweep goes on
            self._record_failure(error)

    def _start(self) -> None:
        if self.folders[0].experiment().scaling.distributed:
            from groundswell.scaling.session import TrainSession

            (folder,) = self.folders
            if not folder.status().is_final:
                self.session = TrainSession(folder, self.log_file, self.mirror)
        else:
            from groundswell.training.trainer import PackTrainer  # torch, only where it computes

            self.trainer = PackTrainer(self.folders)

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
        elif self.session is not None:
            members = self.session.advance(REPORT_SECONDS, self.every_evaluation)
        trains = self.trainer or self.session
        done = trains is None or trains.finished
        if self.mirror is not None:
            self._publish(members, done)
        return {"members": members, "done": done}

    def _publish(self, members: Sequence[dict[str, Any]], done: bool) -> None:
        """Runs that have ended are in the storage before anyone hears of it."""
        assert self.mirror is not None
        for member in members:
            self.mirror.publish(self.sweep.run(member["run_id"]), force=member["state"] != "running")
        if done or any(member["state"] != "running" for member in members):
            self.mirror.flush()

    def _prune_requested(self) -> None:
        assert self.trainer is not None
        if self.mirror is not None:
            for folder in self.folders:
                self.mirror.collect_requests(folder)
        asked = {folder.run_id: reason for folder in self.folders if (reason := folder.prune_request())}
        if asked:
            self.trainer.prune(set(asked), next(iter(asked.values())))

    def _record_failure(self, error: Exception) -> None:
        """Every unfinished run of the pack is marked failed, with the traceback beside it."""
        self.trainer = self.session = None
        log.exception("pack failed")
        self.failure += [folder.fail(error) for folder in self.folders if not folder.status().is_final]

    def _leave(self) -> None:
        if self.trainer is not None:
            self.trainer.save_all()
            self.trainer = None
        if self.session is not None:
            self.session.stop()
            self.session = None
        if self.mirror is not None:
            for folder in self.folders:
                self.mirror.publish(folder, force=True)
            self.mirror.close()
            self.mirror = None
        self.locks.close()

    def cleanup(self) -> None:
        self._leave()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing for Tune to keep: runs checkpoint themselves."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Runs resume from their own folders in `setup`."""


def open_mirror(uri: str, folders: Sequence[RunFolder], inputs: Sequence[str] = ()) -> Mirror:
    """A mirror of the runs' sweep, after what it has of them, and of what they start from, beyond this machine has come
    here."""
    from groundswell.mirror import Mirror
    from groundswell.storage import Storage

    mirror = Mirror(Storage(uri), SweepFolder(folders[0].path.parents[1]))
    for folder in folders:
        mirror.fetch(folder)
    for run_id in inputs:
        mirror.fetch(mirror.sweep.run(run_id), checkpoints=None)  # the best one may be an old one
    return mirror


def log_to_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger("groundswell")
    if not any(isinstance(handler, logging.FileHandler) for handler in root.handlers):
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
