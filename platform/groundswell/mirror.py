"""A sweep's folder in shared storage, so that its results outlive every machine that has worked on it.

<uri>/<sweep>/ has the layout of the sweep's folder (`groundswell.rundir`). Whoever trains a run publishes it; the
driver publishes the rest of the sweep. tracking.json stays at home: the tracking store is asked where there is none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from groundswell import probes
from groundswell.rundir import RunFolder, SweepFolder
from groundswell.storage import Storage, StorageError, local_files

log = logging.getLogger(__name__)
PUBLISH_SECONDS = 60.0  # a run is published at most this often, unless it is forced
TRY_DELAYS_SECONDS = (1.0, 4.0)  # before another try after a passing error
CHECKPOINT_MARKER, RUN_MARKER, SWEEP_MARKER = "state.json", "run.json", "sweep.json"
JOURNAL = "metrics.jsonl"
PROGRESS = (JOURNAL, "status.json", "error.txt", "prune_request.json")  # of a run, besides checkpoints and probes
SWEEP_FOLDERS = ("tables", "figures", "environment")
STUDY = "study.db"
REQUESTS = ("prune_request.json", "pause_request")
REQUEST_SECONDS = 5.0  # how long a request may lie in the storage unseen


class Mirror:
    """Publishing happens in a thread of its own and never raises; fetching happens at once and raises StorageError."""

    def __init__(self, storage: Storage, sweep: SweepFolder, interval_s: float = PUBLISH_SECONDS) -> None:
        self.storage, self.sweep, self.interval_s = storage, sweep, interval_s
        self._seen: dict[str, set[int]] = {}  # run id -> steps of checkpoints that have been here
        self._due: dict[
            str, float
        ] = {}  # what waits to be published ("" for the sweep) -> when, by the monotonic clock
        self._last: dict[str, float] = {}
        self._collected: dict[str, float] = {}
        self._troubles: dict[str, str] = {}  # what could not be published -> why, in one line
        self._condition, self._pushing = threading.Condition(), threading.Lock()
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    # ---- publishing ----

    def publish(self, run: RunFolder, force: bool = False) -> None:
        """Soon, and at most once in `interval_s` unless forced: journal, status, description, checkpoints, probes."""
        self._plan(run.run_id, force)

    def publish_journal(self, run: RunFolder) -> None:
        """At once: it must reach as far as each state that others go on from. Trouble goes to the log."""
        try:
            self._push_progress(run, self._run_path(run), JOURNAL)
        except StorageError as error:
            log.warning("journal of run %s not published: %s", run.run_id, error)

    def publish_sweep(self, force: bool = False) -> None:
        """What is no run's: sweep.json, the study, tables, figures."""
        self._plan("", force)

    def announce(self, run: RunFolder) -> None:
        """A run's description and state at once, for the node that will train it. Raises StorageError."""
        path = self._run_path(run)
        self.storage.push_file(run.path / "experiment.json", f"{path}/experiment.json")
        if (run.path / "status.json").exists() and run.status().state == "waiting":
            self.storage.push_file(run.path / "status.json", f"{path}/status.json")
        self.storage.push_file(run.path / RUN_MARKER, f"{path}/{RUN_MARKER}")

    def flush(self, timeout_s: float = 120.0) -> str | None:
        """Publish now what waits. Returns one line about what could not be; None when all is in the storage."""
        end = time.monotonic() + timeout_s
        with self._condition:
            self._due = dict.fromkeys([*self._due, *self._troubles], 0.0)
            self._condition.notify_all()
            done = self._condition.wait_for(lambda: not self._due and not self._busy, end - time.monotonic())
            if done and not self._troubles:
                return None
            reason = next(iter(self._troubles.values()), f"not done within {timeout_s:.0f} s")
            names = sorted({*self._due, *self._troubles})
        return f"not in {self.storage.uri}: {', '.join(name or self.sweep.name for name in names)} ({reason})"

    def close(self, timeout_s: float = 120.0) -> str | None:
        """`flush`, and no more after that."""
        leftover = self.flush(timeout_s)
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        return leftover

    def _plan(self, name: str, force: bool) -> None:
        with self._condition:
            due = 0.0 if force else self._last.get(name, -self.interval_s) + self.interval_s
            self._due[name] = min(due, self._due.get(name, due))
            self._condition.notify_all()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._closed and not (ready := [n for n, t in self._due.items() if t <= time.monotonic()]):
                    waiting = min(self._due.values(), default=None)
                    self._condition.wait(None if waiting is None else max(0.0, waiting - time.monotonic()))
                if self._closed:
                    return
                name = ready[0]
                del self._due[name]
                self._last[name] = time.monotonic()
                self._busy = True
            trouble = self._try(name)
            with self._condition:
                self._busy = False
                if trouble is None:
                    self._troubles.pop(name, None)
                else:
                    self._troubles[name] = trouble
                self._condition.notify_all()

    def _try(self, name: str) -> str | None:
        """Publish one run or the sweep. Returns why it could not be."""
        action: Callable[[], None] = self._publish_sweep
        if name:
            run = self.sweep.run(name)

            def action() -> None:
                self._publish_run(run)

        for delay in (*TRY_DELAYS_SECONDS, None):
            try:
                action()
                return None
            except Exception as error:
                # A file that is gone was thinned out meanwhile: the next look does not find it.
                passing = getattr(error, "passing", False) or isinstance(error, FileNotFoundError)
                if not passing or delay is None:
                    log.warning("not published: %s: %s", name or self.sweep.name, error, exc_info=not passing)
                    return " ".join(str(error).split())
                time.sleep(delay)
        raise AssertionError

    def _publish_run(self, run: RunFolder) -> None:
        """The journal goes before the checkpoints: it must reach as far as each of them."""
        path = self._run_path(run)
        steps = run.checkpoint_steps()
        self._push_progress(run, path, JOURNAL)
        for step in steps:
            folder = run.checkpoint_folder(step)
            self.storage.push(folder, f"{path}/checkpoints/{folder.name}", CHECKPOINT_MARKER)
        seen = self._seen.setdefault(run.run_id, set())
        for step in sorted(seen - set(run.checkpoint_steps())):  # thinned out here, so there too
            self.storage.delete(f"{path}/checkpoints/{run.checkpoint_folder(step).name}", CHECKPOINT_MARKER)
        self._seen[run.run_id] = set(steps)
        for folder in [*probes.answers(run).values(), *probes.answers_over_time(run).values()]:
            self.storage.push(folder, f"{path}/{folder.relative_to(run.path).as_posix()}", probes.QUESTION)
        for name in ("experiment.json", *PROGRESS[1:], RUN_MARKER):
            self._push_progress(run, path, name)

    def _push_progress(self, run: RunFolder, path: str, name: str) -> None:
        with self._pushing:  # else what was read first could arrive last
            if (run.path / name).exists():
                self.storage.push_file(run.path / name, f"{path}/{name}")

    def _publish_sweep(self) -> None:
        for name in SWEEP_FOLDERS:
            if (self.sweep.path / name).is_dir():
                self.storage.push(self.sweep.path / name, f"{self.sweep.name}/{name}")
        if (self.sweep.path / STUDY).exists():
            with _database_copy(self.sweep.path / STUDY) as copy:
                self.storage.push_file(copy, f"{self.sweep.name}/{STUDY}")
        self.storage.push_file(self.sweep.path / SWEEP_MARKER, f"{self.sweep.name}/{SWEEP_MARKER}")

    # ---- requests, to whoever trains a run on a machine of its own ----

    def send_request(self, run: RunFolder, name: str) -> None:
        """Send a request that is in the run's folder here (REQUESTS), or take it back. Trouble goes to the log."""
        path = f"{self._run_path(run)}/{name}"
        try:
            if (run.path / name).exists():
                self.storage.push_file(run.path / name, path)
            elif self.storage.exists(path):
                self.storage.delete(path)
        except StorageError as error:
            log.warning("request not sent: %s", error)

    def collect_requests(self, run: RunFolder) -> None:
        """Bring the requests here, at most every so often."""
        if time.monotonic() - self._collected.get(run.run_id, -REQUEST_SECONDS) < REQUEST_SECONDS:
            return
        self._collected[run.run_id] = time.monotonic()
        try:
            for name in REQUESTS:
                self.storage.pull_file(f"{self._run_path(run)}/{name}", run.path / name)
        except StorageError as error:
            log.warning("requests not collected: %s", error)

    def states_place(self, run: RunFolder) -> tuple[Any, str]:
        """Where Ray Train keeps the states of a run's workers: file system, path."""
        return self.storage.ray_place(self._run_path(run))

    # ---- fetching ----

    def fetch(self, run: RunFolder, checkpoints: int | None = 2) -> bool:
        """Bring the run here when the storage has one, as far as it is ahead of what is here.

        checkpoints: how many, counted from the newest; None for all. Two are enough to go on training. Returns whether
        anything has come.
        """
        path = self._run_path(run)
        if not self.storage.exists(f"{path}/{RUN_MARKER}"):
            return False
        # The checkpoints before the journal, which its writer sends first: it then reaches as far as they do.
        names = [name for name in self.storage.list(f"{path}/checkpoints") if name.startswith("step-")]
        if checkpoints is not None:  # older ones than here may have been thinned out here
            newer = [name for name in names if name > run.checkpoint_folder(run.checkpoint_step()).name]
            names = newer[max(0, len(newer) - checkpoints) :]
        come = 0
        for name in names:
            come += self.storage.pull(f"{path}/checkpoints/{name}", run.checkpoints / name, CHECKPOINT_MARKER)
        come += self._fetch_progress(run, path)
        if checkpoints is None:
            come += self._fetch_answers(run, path)
        self._seen.setdefault(run.run_id, set()).update(run.checkpoint_steps())
        return come > 0

    def _fetch_progress(self, run: RunFolder, path: str) -> int:
        """Of two journals the longer one counts: training repeats itself exactly, so the other one is its beginning."""
        with tempfile.TemporaryDirectory() as folder:
            there = RunFolder(folder)
            for name in ("experiment.json", *PROGRESS, RUN_MARKER):
                content = self.storage.read(f"{path}/{name}")
                if content is not None:
                    (there.path / name).write_bytes(content)
            if not there.exists() or (run.exists() and _last_step(there) <= _last_step(run)):
                return 0
            run.path.mkdir(parents=True, exist_ok=True)
            files = local_files(there.path)
            for name in sorted(files, key=lambda name: name == RUN_MARKER):
                _replace(files[name], run.path / name)
        return len(files)

    def _fetch_answers(self, run: RunFolder, path: str) -> int:
        come = 0
        for step in self.storage.list(f"{path}/probes"):
            for probe in self.storage.list(f"{path}/probes/{step}"):
                relative = f"probes/{step}/{probe}"
                come += self.storage.pull(f"{path}/{relative}", run.path / relative, probes.QUESTION)
        return come

    def fetch_sweep(self, checkpoints: int | None = 0) -> list[RunFolder]:
        """Bring the sweep here: its study where there is none, and all runs (`checkpoints` as in `fetch`)."""
        if not (self.sweep.path / STUDY).exists():
            self.storage.pull_file(f"{self.sweep.name}/{STUDY}", self.sweep.path / STUDY)
        runs = [self.sweep.run(run_id) for run_id in self.storage.list(f"{self.sweep.name}/runs")]
        return [run for run in runs if self.fetch(run, checkpoints)]

    def _run_path(self, run: RunFolder) -> str:
        return f"{self.sweep.name}/runs/{run.run_id}"


def _last_step(run: RunFolder) -> int:
    """The last step of a run's journal; -1 for none."""
    lines = run.journal()
    return int(lines[-1]["step"]) if lines else -1


def _replace(source: Path, target: Path) -> None:
    """Move a file, also from another file system, so that it appears as a whole."""
    temporary = target.with_name(f".{target.name}.part-{os.getpid()}")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


@contextlib.contextmanager
def _database_copy(path: Path) -> Iterator[Path]:
    """A consistent copy of an SQLite file that others may be writing to."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        yield copy
