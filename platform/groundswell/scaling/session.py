"""One run under Ray Train, followed from the process that Ray Tune gave it."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from groundswell.config import ConfigError
from groundswell.rundir import JournalTail, RunFolder
from groundswell.scaling import states
from groundswell.scaling.capacity import Demand

if TYPE_CHECKING:
    from groundswell.mirror import Mirror

log = logging.getLogger(__name__)
RESTARTS = 3  # times that workers are started again after a failure
LOCK_SECONDS = 60.0  # workers of a dead predecessor may live on for a moment
FETCH_SECONDS = 5.0
STOP_SECONDS = 300.0  # how long workers may take to save a state when they are asked to go


class TrainSession:
    """Trains one run on workers of its own, which Ray Train starts again when one of them dies."""

    def __init__(self, folder: RunFolder, log_file: Path, mirror: Mirror | None = None) -> None:
        """`mirror`: where the workers' states go, and how the run is followed on machines that share no files."""
        self.folder, self.log_file, self.mirror = folder, log_file, mirror
        self.finished = False
        self._error: BaseException | None = None
        self._journal = JournalTail(folder.journal_path)
        self._lines: deque[dict[str, Any]] = deque()  # of the journal, not yet reported
        self._step = -1  # the last one that was read
        self._fetched = time.monotonic()
        self._request_pause(False)
        self._thread = threading.Thread(target=self._fit, daemon=True, name=f"train-{folder.run_id}")
        self._thread.start()

    # ---- training ----

    def _fit(self) -> None:
        try:
            make_trainer(self.folder, self.log_file, self.mirror).fit()
        except BaseException as error:
            self._error = error

    def advance(self, seconds: float, every_evaluation: bool) -> list[dict[str, Any]]:
        """What the run has reached in up to `seconds`; with `every_evaluation` no further than the next one."""
        if not self._lines:
            self._thread.join(seconds)
        ended = not self._thread.is_alive()
        if self.mirror is not None:
            self.mirror.collect_requests(self.folder)  # workers on this machine look for them here
            self._fetch(force=ended)
        for line in self._journal.read():
            if line["step"] > self._step:  # workers that were started again go through some steps twice
                self._lines.append(line)
                self._step = line["step"]
        report: dict[str, Any] = {"run_id": self.folder.run_id, "state": "running"}
        while self._lines:
            line = self._lines.popleft()
            report.update(line["metrics"], step=line["step"])
            if every_evaluation and any(name.startswith("eval/") for name in line["metrics"]):
                break
        self.finished = ended and not self._lines
        if self.finished:
            self._record_failure()
            status = self.folder.status()
            report.update(state=status.state, **({"error": status.error} if status.error else {}))
        return [report] if "step" in report or self.finished else []

    def _record_failure(self) -> None:
        """Workers that were ended by others' doing leave the run as it is; anything else is the run's own failure."""
        status = self.folder.status()
        if self._error is not None and not status.is_final:
            log.error("run %s failed", self.folder.run_id, exc_info=self._error)
            self.folder.fail(_plain(self._error))

    def _fetch(self, force: bool) -> None:
        """What the workers have published, where they have not written it here."""
        assert self.mirror is not None
        if force or time.monotonic() - self._fetched > FETCH_SECONDS:
            self._fetched = time.monotonic()
            try:
                self.mirror.fetch(self.folder, checkpoints=2 if force else 0)
            except ConfigError as error:
                log.warning("run %s: %s", self.folder.run_id, error)

    def _request_pause(self, pause: bool) -> None:
        self.folder.request_pause(pause)
        if self.mirror is not None:
            self.mirror.send_request(self.folder, "pause_request")

    def stop(self) -> None:
        """Have the state saved, and the workers gone."""
        if self._thread.is_alive():
            self._request_pause(True)
            self._thread.join(STOP_SECONDS)
        self._request_pause(False)


def _plain(error: BaseException) -> Exception | str:
    """Ray wraps what a worker says in its own words."""
    causes = [*getattr(error, "worker_failures", {}).values(), error]
    return f"{type(causes[0]).__name__}: {causes[0]}"


def make_trainer(folder: RunFolder, log_file: Path, mirror: Mirror | None = None) -> Any:
    """Ray Train's trainer of this run."""
    import ray
    from pyarrow.fs import LocalFileSystem
    from ray.train import CheckpointConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from groundswell.scaling.signals import CatchTermination

    scaling = folder.experiment().scaling
    on_gpu = scaling.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    demand = Demand.of(scaling, on_gpu)
    local = LocalFileSystem(), str(folder.path.resolve())
    filesystem, place = local if mirror is None else mirror.states_place(folder)
    states.States(filesystem, place).mend()
    uri = None if mirror is None else mirror.storage.uri
    return TorchTrainer(
        train_on_worker,
        train_loop_config={"run": str(folder.path.resolve()), "log": str(log_file.resolve()), "storage": uri},
        scaling_config=ScalingConfig(
            num_workers=demand.num_workers, use_gpu=on_gpu, resources_per_worker=demand.per_worker
        ),
        # gloo beside NCCL: with offload, norms and states are reduced on the CPU
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=int(max(1, scaling.timeout_s))
        ),
        run_config=RunConfig(  # type: ignore[arg-type]
            name=states.FOLDER,
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=RESTARTS),
            checkpoint_config=CheckpointConfig(num_to_keep=2),  # type: ignore[arg-type]
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[CatchTermination()],  # type: ignore[list-item]
        ),
    )


# ---- in a worker ----


def train_on_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    from ray import train

    from groundswell.scaling import signals
    from groundswell.scaling.control import Control
    from groundswell.scaling.worker import Place, WorkerTrainer
    from groundswell.trainable import log_to_file, open_mirror
    from groundswell.training import checkpoint

    folder, context = RunFolder(config["run"]), train.get_context()
    rank = context.get_world_rank()
    log_to_file(Path(config["log"]))
    mirror = open_mirror(config["storage"], [folder]) if config["storage"] else None
    if not folder.exists():
        raise ConfigError(
            f"{folder.path}: this machine does not see the run's folder; put --output on a file system that all "
            "machines of the cluster share, or give --storage a URI that all of them reach"
        )
    if folder.status().is_final:  # ended (failed, for instance) in a previous start of the workers
        return

    def report(step: int, part: Path) -> None:
        if mirror is not None and rank == 0:
            mirror.publish_journal(folder)
        train.report(
            {"step": step},
            checkpoint=train.Checkpoint.from_directory(part),
            checkpoint_dir_name=checkpoint.folder_name(step),
            delete_local_checkpoint_after_upload=True,
        )
        if mirror is not None and rank == 0:
            mirror.publish(folder)

    def look() -> None:
        if mirror is not None:
            mirror.publish(folder)
            mirror.collect_requests(folder)

    lock = FileLock(folder.path / "workers.lock", timeout=LOCK_SECONDS)
    with tempfile.TemporaryDirectory(prefix="groundswell-") as scratch:
        if rank == 0:
            lock.acquire()
        try:
            control = Control(folder, rank == 0, signals.is_leaving, look)
            place = Place(rank, context.get_world_size(), Path(scratch))
            newest = train.get_checkpoint()
            trainer = WorkerTrainer(folder, place, report, control)
            if newest is None:
                trainer.resume(None)
            else:
                with newest.as_directory() as state:
                    trainer.resume(Path(state))
            trainer.train()
        except Exception as error:
            log.exception("worker %d of run %s", rank, folder.run_id)
            if is_own_failure(error):
                folder.fail(error)
            raise
        finally:
            lock.release()
            if mirror is not None:
                if rank == 0:
                    mirror.publish(folder, force=True)
                mirror.close()


def is_own_failure(error: Exception) -> bool:
    """Is this the run's own fault, so that starting its workers again would not help?

    A peer that is gone shows as a RuntimeError of torch.distributed, a lost file system as an OSError.
    """
    import torch

    from groundswell.scaling.control import Leaving

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return not isinstance(error, RuntimeError | OSError | Leaving)
