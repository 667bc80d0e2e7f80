"""The thread that carries a sweep's results to MLflow while it trains. A slow or broken store never stops training."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from groundswell.config import ConfigError
from groundswell.rundir import SweepFolder
from groundswell.tracking.location import absolute_uri, default_uri
from groundswell.tracking.run_sync import Parent, RunSync, backlog
from groundswell.tracking.store import Store, is_data_error
from groundswell.tracking.sweep_sync import SweepSync

log = logging.getLogger("groundswell.tracking")
MAX_BACKOFF_SECONDS = 30.0
LOOK_AGAIN_SECONDS = 30.0  # between two looks at runs that are done: another process may ask probes of them
RECONNECT_AFTER = 4  # failed rounds in a row: the store may be another one by now


@dataclass(frozen=True)
class Leftover:
    """What could not be written; false when that is nothing."""

    runs: int
    lines: int  # readings and endings of runs
    outputs: int
    error: str | None
    sweep: Path

    def __bool__(self) -> bool:
        return bool(self.runs or self.outputs)

    def __str__(self) -> str:
        if not self:
            return "MLflow has everything"
        parts = [f"{self.runs} run(s), {self.lines} line(s)"] if self.runs else []
        parts += [f"{self.outputs} table(s) and figure(s)"] if self.outputs else []
        reason = f" ({self.error})" if self.error else ""
        command = shlex.join(["groundswell", "sync", self.sweep.name, "--output", str(self.sweep.parent)])
        missing = f"MLflow does not have everything yet: {' and '.join(parts)}{reason}."
        return f"{missing} Nothing is lost; send it later: {command}"


class Tracker:
    """Tails the run folders of one sweep, alone (tracking.lock). Its errors never reach the caller."""

    def __init__(
        self,
        sweep: SweepFolder,
        uri: str | None = None,
        experiment_name: str | None = None,
        parent_name: str | None = None,
        interval_s: float = 2.0,
    ) -> None:
        self.sweep = sweep
        self.uri = absolute_uri(uri) if uri else default_uri(sweep.path.parent)
        self.interval_s = interval_s
        self._own = SweepSync(sweep, experiment_name or sweep.name, parent_name or sweep.name)
        self._runs: dict[str, RunSync] = {}
        self._done: set[str] = set()  # final and completely written: looked at now and then
        self._looked_at_all = time.monotonic()
        self._store: Store | None = None
        self._parent: Parent | None = None
        self._error: str | None = None
        self._failures = 0  # rounds in a row
        self._complete = False
        self._deadline: float | None = None
        self._delay_s = 0.0
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)

    def start(self, delay_s: float = 0.0) -> None:
        """Returns at once; importing MLflow and making the database happen in the thread, `delay_s` later."""
        self._delay_s = delay_s
        self._thread.start()

    def log_outputs(self, paths: Mapping[str, str | Path]) -> None:
        """Artifact path -> local file (tables, figures), for the parent run."""
        self._own.add_outputs({name: Path(path) for name, path in paths.items()})
        self._wake.set()

    def look_again(self, run_id: str) -> None:
        """Something has come to a run that was at its end."""
        self._done.discard(run_id)
        self._wake.set()

    def pending(self) -> int:
        """Journal lines, endings and outputs that MLflow does not have yet, read from disk."""
        lines = sum(backlog(folder, self.uri) for folder in self.sweep.runs() if folder.run_id not in self._done)
        return lines + len(self._own.unsent_outputs())

    def close(self, timeout_s: float = 60.0) -> Leftover:
        """Write the rest, for at most `timeout_s` seconds, and end the thread."""
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._complete:
            return Leftover(0, 0, 0, None, self.sweep.path)
        counts = [backlog(folder, self.uri) for folder in self.sweep.runs()]
        outputs = len(self._own.unsent_outputs())
        return Leftover(sum(map(bool, counts)), sum(counts), outputs, self._error, self.sweep.path)

    # ---- the thread ----

    def _run(self) -> None:
        handler = _log_handler(self.sweep.path / "log" / "tracking.log")
        lock = FileLock(self.sweep.path / "tracking.lock", timeout=0)
        self._wake.wait(self._delay_s)
        try:
            while not self._expired():
                self._wake.clear()
                closing = self._deadline is not None
                if self._round(lock, handler, closing):
                    return
                self._wake.wait(self._pause(closing))
        finally:
            lock.release(force=True)
            log.removeHandler(handler)

    def _expired(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _pause(self, closing: bool) -> float:
        delay = min(MAX_BACKOFF_SECONDS, 0.5 * 2**self._failures) if self._failures else self.interval_s
        return min(delay, 0.5) if closing else delay

    def _round(self, lock: FileLock, handler: logging.Handler, closing: bool) -> bool:
        """Write all that is new. Returns whether the work is over."""
        try:
            if not lock.is_locked:
                lock.acquire()  # tried each round: a `groundswell sync` may hold it for a while
            if self._store is None or self._parent is None:
                self._store = Store(self.uri, handler)
                self._parent = self._own.connect(self._store)
            left = self._push_runs(self._store, self._parent, closing)
            self._own.push_outputs(self._store, self._parent)
            if closing and not left:
                self._end(self._store, self._parent)
                self._complete = True
                self._error = None
        except Timeout:
            self._fail("another process is tracking this sweep")
        except Exception as error:
            self._fail(_one_line(error), error)
        else:
            self._failures = 0
        return self._complete

    def _fail(self, text: str, error: Exception | None = None) -> None:
        self._failures += 1
        if text != self._error:
            log.warning("tracking waits: %s", text, exc_info=error)
        self._error = text
        if self._failures % RECONNECT_AFTER == 0:
            self._store = self._parent = None

    def _push_runs(self, store: Store, parent: Parent, closing: bool) -> int:
        """Returns how many runs could not be written. Raises when the store itself is the trouble."""
        left = 0
        if closing or time.monotonic() - self._looked_at_all > LOOK_AGAIN_SECONDS:
            self._done.clear()
            self._looked_at_all = time.monotonic()
        for sync in self._known_runs():
            if sync.retry_at > time.monotonic() or self._expired():
                left += 1
                continue
            try:
                sync.push(store, parent)
                sync.succeeded()
                if sync.is_done():
                    self._done.add(sync.folder.run_id)
            except Exception as error:
                sync.postpone()  # so that a run that MLflow does not take cannot hold up the others
                if not is_data_error(error):
                    raise
                left += 1
                self._error = f"run {sync.folder.run_id}: {_one_line(error)}"
                log.warning("tracking: %s", self._error, exc_info=error)
        return left

    def _known_runs(self) -> list[RunSync]:
        for folder in self.sweep.runs():
            if folder.run_id not in self._runs:
                self._runs[folder.run_id] = RunSync(folder)
        open_runs = (sync for run_id, sync in self._runs.items() if run_id not in self._done)
        return sorted(open_runs, key=lambda sync: sync.number)

    def _end(self, store: Store, parent: Parent) -> None:
        for run_id, sync in self._runs.items():
            if run_id not in self._done:
                sync.interrupt(store)
        self._own.finish(store, parent)


def sync_sweep(sweep: SweepFolder, uri: str | None = None, timeout_s: float = 600.0) -> Leftover:
    """Write what MLflow does not have yet. Raises ConfigError while a running sweep does that itself."""
    lock = FileLock(sweep.path / "tracking.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{sweep.path}: the sweep is running and tracks itself; nothing to do") from None
    lock.release()
    tracker = Tracker(sweep, uri)
    tracker.start()
    return tracker.close(timeout_s)


def _log_handler(path: Path) -> logging.Handler:
    """MLflow's and our own remarks go to a file: the terminal belongs to the sweep's progress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO)
    return handler


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    for mark in ("[SQL:", "(Background on this error"):
        text = text.split(mark)[0].strip()
    return f"{type(error).__name__}: {text}"[:300]
