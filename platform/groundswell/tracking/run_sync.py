"""One run, from its folder to its MLflow run, as often as needed and each thing once.

What has been written is kept in the folder's tracking.json. It may lag behind the store (a kill in between): readings
are then sent again with the journal's own timestamps, and runs and models are found by what marks them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from groundswell import probes
from groundswell.experiment import identity_of
from groundswell.files import atomic_write
from groundswell.rundir import FINAL_STATES, JournalTail, RunFolder, Status
from groundswell.tracking.names import flatten, key_name, model_name, param_value, tag_value
from groundswell.tracking.store import MAX_METRICS, Reading, Store, StoredRun

log = logging.getLogger(__name__)
TRAINING_STATE = "training_state.safetensors"  # stays in the run folder: only training can use it
# A run that never got to its end by itself is KILLED (MLflow has no other word), diverged ones count as FAILED.
MLFLOW_STATUS = {
    "waiting": "SCHEDULED", "running": "RUNNING", "finished": "FINISHED", "stopped": "FINISHED",
    "pruned": "KILLED", "interrupted": "KILLED", "diverged": "FAILED", "failed": "FAILED",
}  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """What the runs of a sweep have in common."""

    experiment_id: str
    run: StoredRun
    tags: dict[str, str]  # for each child
    children: dict[str, StoredRun]  # those that the store had when the tracker connected


@dataclass
class Memory:
    """tracking.json: what the store has of this run."""

    uri: str = ""
    parent: str = ""  # the sweep's MLflow run; another one means another store
    mlflow_run_id: str | None = None
    artifact_uri: str = ""
    last_step: int = -1
    params: bool = False
    description: str = ""  # run.json as last written to the store
    checkpoints: list[str] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)  # "step-N/<probe>/<digest of its scalars>"
    model_id: str | None = None
    state: str | None = None  # last state written; "interrupted" for a run that an ended driver left half-done
    ignored: bool = False  # somebody deleted the MLflow run: leave it so

    @classmethod
    def load(cls, path: Path) -> Memory:
        """Empty where there is none, or none that can be read: the store is asked then."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            values = json.loads(path.read_bytes())
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        return cls()


class RunSync:
    _WATCHED = ("metrics.jsonl", "status.json", "run.json", "checkpoints")

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.number = int(folder.description().get("number", 0))
        self.memory = Memory.load(self._memory_path)
        self.attempts, self.retry_at = 0, 0.0  # after errors, by the monotonic clock
        self._seen: tuple[Any, ...] | None = None
        self._reset_reading()

    @property
    def _memory_path(self) -> Path:
        return self.folder.path / "tracking.json"

    def _reset_reading(self) -> None:
        self._tail = JournalTail(self.folder.journal_path)
        self._last_evaluation: dict[str, Any] | None = None
        self._reconciled = False

    def _save(self) -> None:
        # Not synced: what a power cut takes is found again in the store.
        atomic_write(self._memory_path, json.dumps(asdict(self.memory), indent=1) + "\n", sync=False)

    def _signature(self) -> tuple[Any, ...]:
        return tuple(_stat(self.folder.path / n) for n in self._WATCHED) + _folders(self.folder.path / "probes")

    # ---- the work ----

    def push(self, store: Store, parent: Parent) -> bool:
        """Write what is new. Returns whether there was anything; raises what MLflow raises."""
        signature = self._signature()
        if signature == self._seen or self.memory.ignored:
            return False
        if self.memory.parent != parent.run.run_id:
            self.memory = Memory(uri=store.uri, parent=parent.run.run_id)
            self._reset_reading()
        status = self.folder.status()
        if status.state == "waiting" and self.memory.mlflow_run_id is None:
            self._seen = signature  # its start time, which MLflow takes only at creation, is not known yet
            return False
        try:
            worked = self._push(store, parent, status)
        except Exception as error:
            self._reset_reading()
            if self._is_gone(store, parent, error):
                return False
            raise
        self._seen = signature
        return worked

    def _push(self, store: Store, parent: Parent, status: Status) -> bool:
        lines = self._new_lines()
        checkpoints = self._new_checkpoints(status)
        answers = {key: path for key, path in _answers(self.folder).items() if key not in self.memory.probes}
        tags = self._changed_tags(parent)
        # A half-done run is shown as running again only when it trains again.
        idle = self.memory.state == "interrupted" and not status.is_final and not lines
        new_state = status.state != self.memory.state and not idle
        if not (lines or checkpoints or answers or tags or new_state or not self.memory.params):
            return False
        run = self._ensure_run(store, parent, status)
        if lines and not self._reconciled:
            lines = self._reconcile(store, run, lines)
        self._write(store, run, lines, tags)
        for folder in checkpoints:
            self._log_checkpoint(store, run, folder)
        for key, path in answers.items():
            self._log_answer(store, run, key, path)
        if new_state and status.state != self.memory.state:
            self._write_state(store, parent, run, status)
        return True

    def _new_lines(self) -> list[dict[str, Any]]:
        read = self._tail.read()
        for line in read:
            if any(name.startswith("eval/") for name in line["metrics"]):
                self._last_evaluation = line
        return [line for line in read if line["step"] > self.memory.last_step]

    def _new_checkpoints(self, status: Status) -> list[Path]:
        """Those that stay. While the run trains on, the newest ones (which training could resume from) may yet go."""
        folders = [self.folder.checkpoint_folder(step) for step in self.folder.checkpoint_steps()]
        return [
            folder
            for folder in folders
            if folder.name not in self.memory.checkpoints
            and (status.is_final or not (folder / TRAINING_STATE).exists())
        ]

    def _changed_tags(self, parent: Parent) -> dict[str, str]:
        text = json.dumps(self.folder.description(), sort_keys=True)
        return self._description_tags(parent) if text != self.memory.description else {}

    def _description_tags(self, parent: Parent) -> dict[str, str]:
        d = self.folder.description()
        tags = {"mlflow.runName": tag_value(d["name"]), "groundswell.pack": tag_value(d["pack"])}
        for path, run_id in d.get("inputs", {}).items():  # of a stage of a pipeline: where it starts from
            tags[f"groundswell.input.{path}"] = run_id
            stored = Memory.load(self.folder.path.parent / run_id / "tracking.json").mlflow_run_id
            tags |= {f"groundswell.input_run.{path}": stored} if stored else {}
        return tags

    def _ensure_run(self, store: Store, parent: Parent, status: Status) -> StoredRun:
        """The MLflow run: remembered, or found by its tag, or new."""
        memory = self.memory
        if memory.mlflow_run_id is not None:
            return StoredRun(memory.mlflow_run_id, memory.artifact_uri, {})
        run = parent.children.get(self.folder.run_id)
        if run is None:
            experiment = self.folder.path / "experiment.json"
            tags = parent.tags | self._description_tags(parent) | {
                "mlflow.parentRunId": parent.run.run_id,
                "groundswell.run_id": self.folder.run_id,
                "groundswell.experiment_hash": _experiment_hash(self.folder),
                "groundswell.state": "running",
            }  # fmt: skip
            run = store.create_run(parent.experiment_id, tags["mlflow.runName"], tags, status.started_ms)
            store.log_files(run, "", [experiment])
            memory.state, self._reconciled = "running", True  # nothing to compare a new run with
        memory.mlflow_run_id, memory.artifact_uri = run.run_id, run.artifact_uri
        self._save()
        return run

    def _reconcile(self, store: Store, run: StoredRun, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out what the store has already: the memory may be older than it, and after a resume the same steps
        stand in the journal with new times."""
        known = store.last_step(run.run_id, [key_name(name) for name in _covering_names(lines)])
        self.memory.last_step = max(self.memory.last_step, known)
        self._reconciled = True
        return [line for line in lines if line["step"] > self.memory.last_step]

    def _write(self, store: Store, run: StoredRun, lines: list[dict[str, Any]], tags: dict[str, str]) -> None:
        memory = self.memory
        params: dict[str, str] = {}
        if not memory.params:
            tree = self.folder.description()["axes"] | flatten(self.folder.experiment_dict())  # axes of names too
            params = {key_name(name): param_value(value) for name, value in tree.items()}
        batches = list(_batches(lines)) or [([], memory.last_step)]
        for readings, step in batches:
            store.log_batch(run.run_id, readings, params, tags)
            memory.last_step, memory.params = max(memory.last_step, step), True
            memory.description = json.dumps(self.folder.description(), sort_keys=True) if tags else memory.description
            params, tags = {}, {}
            self._save()

    def _log_checkpoint(self, store: Store, run: StoredRun, folder: Path) -> None:
        """Weights and description; a folder that training removes in this moment is passed over."""
        with contextlib.suppress(FileNotFoundError):
            files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != TRAINING_STATE)
            store.log_files(run, f"checkpoints/{folder.name}", files, link=True)
            self.memory.checkpoints.append(folder.name)
            self._save()

    def _log_answer(self, store: Store, run: StoredRun, key: str, path: Path) -> None:
        """Scalars as metrics at the checkpoint's step, the files as artifacts. What is found over time has no step."""
        place = path.parent.name
        if place != probes.OVER_TIME:
            # The file's own time, so that readings sent twice (a kill in between) are stored once.
            time_ms = (path / probes.QUESTION).stat().st_mtime_ns // 1_000_000
            step, found = int(place.removeprefix("step-")), probes.scalars(path)
            readings = [(key_name(name), float(value), time_ms, step) for name, value in found.items()]
            for start in range(0, len(readings), MAX_METRICS):
                store.log_batch(run.run_id, readings[start : start + MAX_METRICS])
        store.log_files(run, f"probes/{place}/{path.name}", sorted(path.iterdir()))
        self.memory.probes.append(key)
        self._save()

    def _write_state(self, store: Store, parent: Parent, run: StoredRun, status: Status) -> None:
        tags: dict[str, str] = {"groundswell.state": status.state}
        tags |= {f"groundswell.{k}": tag_value(v) for k in ("reason", "error") if (v := getattr(status, k))}
        if status.is_final:
            error = self.folder.path / "error.txt"
            if status.state == "failed" and error.exists():
                store.log_files(run, "", [error])
            if status.state in ("finished", "stopped") and self.memory.checkpoints and not self.memory.model_id:
                self._log_model(store, parent, run)
            store.log_batch(run.run_id, tags=tags)
            store.client.set_terminated(run.run_id, MLFLOW_STATUS[status.state], status.ended_ms)
        else:
            store.log_batch(run.run_id, tags=tags)
            store.client.update_run(run.run_id, status=MLFLOW_STATUS[status.state])
        self.memory.state = status.state
        self._save()

    def _log_model(self, store: Store, parent: Parent, run: StoredRun) -> None:
        last = self.memory.checkpoints[-1]
        lines = [self._last_evaluation] if self._last_evaluation else []
        readings = [reading for batch, _ in _batches(lines) for reading in batch][:MAX_METRICS]
        name = model_name(f"{self.folder.description()['name']} ({self.folder.run_id})")
        tags = {"groundswell.checkpoint": f"runs:/{run.run_id}/checkpoints/{last}"}
        self.memory.model_id = store.log_model(parent.experiment_id, run, name, tags, readings)

    def interrupt(self, store: Store) -> None:
        """The driver ends while this run is half-done: nobody trains it now."""
        run_id = self.memory.mlflow_run_id
        if run_id is not None and not self.memory.ignored and self.memory.state in ("running", "waiting"):
            store.log_batch(run_id, tags={"groundswell.state": "interrupted"})
            store.client.set_terminated(run_id, MLFLOW_STATUS["interrupted"])
            self.memory.state = "interrupted"
            self._save()

    def _is_gone(self, store: Store, parent: Parent, error: Exception) -> bool:
        """Did the write fail because the MLflow run is not there any more? Then settle it."""
        run_id = self.memory.mlflow_run_id
        if run_id is None or getattr(error, "error_code", None) not in (
            "INVALID_PARAMETER_VALUE",
            "RESOURCE_DOES_NOT_EXIST",
        ):
            return False
        if store.is_deleted(run_id):
            log.warning("%s: its MLflow run was deleted; it is tracked no more", self.folder.run_id)
            self.memory.ignored = True
        elif error.error_code == "RESOURCE_DOES_NOT_EXIST":  # type: ignore[attr-defined]
            log.warning("%s: its MLflow run has vanished; writing a new one", self.folder.run_id)
            parent.children.pop(self.folder.run_id, None)
            self.memory = Memory()
        else:
            return False
        self._save()
        return True

    def is_done(self) -> bool:
        """At its end, and all of it written."""
        if self.memory.ignored:
            return True
        return (
            self._seen is not None
            and self.memory.state in FINAL_STATES
            and self.memory.state == self.folder.status().state
        )

    # ---- after errors ----

    def postpone(self) -> None:
        self.attempts += 1
        self.retry_at = time.monotonic() + min(60.0, 0.5 * 2**self.attempts)

    def succeeded(self) -> None:
        self.attempts, self.retry_at = 0, 0.0


def backlog(folder: RunFolder, uri: str) -> int:
    """Journal lines and answers of probes that the store at `uri` does not have, plus one for a state that it does
    not know."""
    memory = _memory_for(folder, uri)
    status = folder.status()
    if memory.ignored:
        return 0
    lines = sum(line["step"] > memory.last_step for line in folder.journal())
    return lines + unsent_answers(folder, uri) + int(status.is_final and status.state != memory.state)


def unsent_answers(folder: RunFolder, uri: str) -> int:
    memory = _memory_for(folder, uri)
    return 0 if memory.ignored else sum(key not in memory.probes for key in _answers(folder))


def _memory_for(folder: RunFolder, uri: str) -> Memory:
    memory = Memory.load(folder.path / "tracking.json")
    return memory if memory.uri == uri else Memory()


def _answers(folder: RunFolder) -> dict[str, Path]:
    """Answers of probes: a key that changes with what was asked -> folder."""
    paths = [*probes.answers(folder).values(), *probes.answers_over_time(folder).values()]
    digests = [hashlib.sha256((path / probes.QUESTION).read_bytes()).hexdigest()[:8] for path in paths]
    return {f"{path.parent.name}/{path.name}/{digest}": path for path, digest in zip(paths, digests, strict=True)}


def _batches(lines: Sequence[dict[str, Any]]) -> Iterator[tuple[list[Reading], int]]:
    """Readings, and the step up to which everything is written after them (batches end with a line)."""
    readings: list[Reading] = []
    step = done = -1
    for line in lines:
        if readings and len(readings) + len(line["metrics"]) > MAX_METRICS:
            yield readings, step
            readings = []
        done, step = step, line["step"]
        readings += [(key_name(name), float(value), line["time_ms"], step) for name, value in line["metrics"].items()]
        while len(readings) > MAX_METRICS:  # one very wide line
            yield readings[:MAX_METRICS], done
            readings = readings[MAX_METRICS:]
    if lines:
        yield readings, step


def _covering_names(lines: Sequence[dict[str, Any]]) -> set[str]:
    """A few metrics such that each line has at least one of them; the line's last one, in case it takes two batches."""
    names: set[str] = set()
    for line in lines:
        if line["metrics"] and not names & line["metrics"].keys():
            names.add(next(reversed(line["metrics"])))
    return names


def _experiment_hash(folder: RunFolder) -> str:
    """`Experiment.identity`, without importing the experiment's classes."""
    return identity_of(folder.experiment_dict())


def _folders(path: Path) -> tuple[Any, ...]:
    """Changes when anything is put into a folder in `path`."""
    with contextlib.suppress(FileNotFoundError):
        return tuple(sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(path)))
    return ()


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
