"""The sweep's own MLflow run, parent of its runs: where it ran, from which code, and the report at the end."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundswell.files import atomic_write
from groundswell.rundir import SweepFolder
from groundswell.tracking.location import artifact_root
from groundswell.tracking.names import tag_value
from groundswell.tracking.provenance import environment, git_state
from groundswell.tracking.run_sync import Parent
from groundswell.tracking.store import Store, StoredRun
from groundswell.tracking.view import TAG, table_view


class SweepSync:
    """Remembers in <sweep>/tracking.json. `add_outputs` and `unsent_outputs` may be called from any thread."""

    def __init__(self, sweep: SweepFolder, experiment_name: str, parent_name: str) -> None:
        self.sweep, self.experiment_name, self.parent_name = sweep, experiment_name, parent_name
        self._path = sweep.path / "tracking.json"
        self._lock = threading.Lock()
        self._memory: dict[str, Any] = {"outputs": {}, "environments": []}
        with contextlib.suppress(OSError, ValueError):
            self._memory |= json.loads(self._path.read_bytes())

    def _remember(self, **changes: Any) -> None:
        self._memory |= changes
        atomic_write(self._path, json.dumps(self._memory, indent=1) + "\n")

    # ---- connecting ----

    def connect(self, store: Store) -> Parent:
        """Find or make the experiment and the parent run, and mark the parent as running."""
        root = artifact_root(store.uri, self.sweep.path.parent)
        location = f"{root}/{self.experiment_name}" if root else None
        experiment_id = store.experiment(self.experiment_name, location)
        state = git_state()
        common = {"groundswell.sweep": self.sweep.name, "mlflow.user": _user(), "mlflow.source.type": "LOCAL"}
        common["mlflow.source.name"] = Path(sys.argv[0]).name or "python"
        if state.commit:
            common["mlflow.source.git.commit"] = state.commit
            common["groundswell.git_commit"] = state.commit + ("-dirty" if state.dirty else "")
        run, is_new = self._find_or_create(store, experiment_id, common)
        with self._lock:
            if self._memory.get("parent_run_id") != run.run_id:  # another store has none of what this one was sent
                outputs = {k: v | {"sent": None} for k, v in self._memory["outputs"].items()}
                self._remember(uri=store.uri, parent_run_id=run.run_id, outputs=outputs, environments=[])
            if self._memory.get("experiment_id") != experiment_id:
                self._remember(experiment_id=experiment_id)
        self._log_environment(store, run, state)
        self._set_view(store, experiment_id)
        children: dict[str, StoredRun] = {}
        if not is_new:
            store.client.update_run(run.run_id, status="RUNNING")
            found = store.find_runs(experiment_id, {"mlflow.parentRunId": run.run_id})
            children = {
                child.tags["groundswell.run_id"]: child for child in found if "groundswell.run_id" in child.tags
            }
        return Parent(experiment_id, run, common, children)

    def _find_or_create(self, store: Store, experiment_id: str, common: Mapping[str, str]) -> tuple[StoredRun, bool]:
        """The remembered run where this store has it, else the one with this sweep's tags, else a new one."""
        remembered = self._memory.get("parent_run_id")
        run = store.get_run(remembered) if remembered else None
        if run is not None and run.tags.get("groundswell.sweep") == self.sweep.name:
            return run, False
        marks = {"groundswell.sweep": self.sweep.name, "groundswell.folder": str(self.sweep.path.resolve())}
        found = store.find_runs(experiment_id, marks)
        if found:
            return found[0], False
        tags = {**common, **marks, "mlflow.note.content": self._note()}
        return store.create_run(experiment_id, self.parent_name, tags, None), True

    def _note(self) -> str:
        """Shown by the UI as the parent's description."""
        d = self.sweep.description()
        lines = [f"Sweep `{self.sweep.name}` in `{self.sweep.path.resolve()}`", ""]
        if d.get("metric"):
            lines += [f"Metric: `{d['metric']}` ({d.get('mode', 'max')})", ""]
        lines += [f"* `{path}`: {_axis_text(axis)}" for path, axis in (d.get("axes") or {}).items()]
        return tag_value("\n".join(lines))

    def _set_view(self, store: Store, experiment_id: str) -> None:
        """The columns of MLflow's table; runs of one sweep measure the same, so one journal tells the metrics."""
        names: set[str] = set()
        for run in self.sweep.runs()[:1]:
            names = {name for line in run.journal() for name in line["metrics"]}
        store.client.set_experiment_tag(experiment_id, TAG, table_view(self.sweep.description(), names))

    def _log_environment(self, store: Store, run: StoredRun, state: Any) -> None:
        """environment.json and git.patch; those of a later session on other code or another machine get a number."""
        values = environment() | {"git": state.to_dict()}
        steady = {key: value for key, value in values.items() if key != "command"}
        digest = hashlib.sha256(json.dumps(steady, sort_keys=True).encode() + state.patch).hexdigest()
        known = self._memory["environments"]
        if digest in known:
            return
        suffix = f"-{len(known) + 1}" if known else ""
        folder = self.sweep.path / "environment"
        files = [atomic_write(folder / f"environment{suffix}.json", json.dumps(values, indent=2) + "\n")]
        if state.patch:
            files.append(atomic_write(folder / f"git{suffix}.patch", state.patch))
        store.log_files(run, "", files)
        with self._lock:
            self._remember(environments=[*known, digest])

    # ---- tables and figures ----

    def add_outputs(self, paths: Mapping[str, Path]) -> None:
        """Artifact path -> file; remembered on disk, so that a later `sync` can still send them."""
        with self._lock:
            new = {name: {"file": str(Path(path).resolve()), "sent": None} for name, path in paths.items()}
            self._remember(outputs=self._memory["outputs"] | new)

    def unsent_outputs(self) -> list[str]:
        with self._lock:
            return [name for name, entry in self._memory["outputs"].items() if entry["sent"] is None]

    def push_outputs(self, store: Store, parent: Parent) -> None:
        for name in self.unsent_outputs():
            file = Path(self._memory["outputs"][name]["file"])
            target = Path(name)
            if file.exists():
                named = file if file.name == target.name else _renamed_copy(file, target.name)
                store.log_files(parent.run, "" if str(target.parent) == "." else target.parent.as_posix(), [named])
                if named is not file:
                    named.unlink()
            with self._lock:
                self._memory["outputs"][name]["sent"] = store.uri
                self._remember()

    # ---- the end ----

    def finish(self, store: Store, parent: Parent) -> None:
        """The parent's status from those of its runs: KILLED while some are not at their end."""
        states = Counter(folder.status().state for folder in self.sweep.runs())
        text = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        self._set_view(store, parent.experiment_id)
        store.log_batch(parent.run.run_id, tags={"groundswell.runs": text or "none"})
        unfinished = states["waiting"] + states["running"]
        status = "KILLED" if unfinished else "FAILED" if states["failed"] else "FINISHED"
        store.client.set_terminated(parent.run.run_id, status)


def _axis_text(axis: Any) -> str:
    if isinstance(axis, dict) and axis.get("low") is not None:
        return f"{axis['low']} to {axis['high']}"
    values = axis.get("values") if isinstance(axis, dict) else axis
    return ", ".join(str(value) for value in values) if isinstance(values, list) else str(values)


def _renamed_copy(file: Path, name: str) -> Path:
    return atomic_write(file.parent / f".upload-{file.stem}" / name, file.read_bytes(), sync=False)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container user without a name
        return "unknown"
