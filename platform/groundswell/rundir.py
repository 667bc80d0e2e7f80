"""What a sweep and its runs keep on disk. These folders are the truth: tracking and reports read from them.

<output>/<sweep>/sweep.json, runs/<run id>/{experiment.json, run.json, metrics.jsonl, status.json, checkpoints/}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from groundswell.config import ConfigError
from groundswell.files import atomic_write, check_name

if TYPE_CHECKING:  # torch and pandas are slow to import, and listing runs needs neither
    import pandas as pd

    from groundswell.experiment import Experiment
    from groundswell.sweep import PlannedRun

log = logging.getLogger(__name__)
State = Literal["waiting", "running", "finished", "stopped", "pruned", "diverged", "failed"]
FINAL_STATES = frozenset({"finished", "stopped", "pruned", "diverged", "failed"})
STATES = ("waiting", "running", "finished", "stopped", "pruned", "diverged", "failed")


@dataclass(frozen=True)
class Status:
    """Where a run is. Final: finished (whole budget), stopped (its own stop rule), pruned (by the scheduler),
    diverged (a metric is not finite), failed (an error)."""

    state: State = "waiting"
    step: int = 0
    reason: str | None = None
    error: str | None = None
    started_ms: int | None = None  # milliseconds since 1970
    ended_ms: int | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES


class RunFolder:
    """One run's folder. A single process trains a run at a time and alone writes its journal; anyone may read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._journal_file: IO[str] | None = None
        self._last_step: int | None = None  # of the journal, once known

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def run_id(self) -> str:
        return self.path.name

    # ---- what the run is ----

    def write_new(
        self,
        experiment: Experiment,
        name: str,
        axes: Mapping[str, Any],
        pack: str,
        number: int,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the run; what it has trained so far stays. `run.json` comes last: with it the folder is whole.

        The experiment may differ in what is no part of its identity (the number of workers)."""
        description = {"name": name, "axes": dict(axes), "pack": pack, "number": number}
        description |= {"inputs": dict(inputs)} if inputs else {}
        texts = {"experiment.json": experiment.to_json(), "run.json": json.dumps(description, indent=2) + "\n"}
        for file, text in texts.items():
            target = self.path / file
            if not target.exists() or target.read_text(encoding="utf-8") != text:
                atomic_write(target, text)

    def exists(self) -> bool:
        return (self.path / "run.json").exists()

    def experiment(self) -> Experiment:
        """Imports the experiment's classes. `experiment_dict` does not."""
        from groundswell.experiment import Experiment
        from groundswell.stages import remember

        remember(self.path.parents[1])
        return Experiment.from_file(self.path / "experiment.json")

    def experiment_dict(self) -> dict[str, Any]:
        return _read_json(self.path / "experiment.json")

    def description(self) -> dict[str, Any]:
        """name, axes, pack, number; of a stage of a pipeline, inputs too (field -> run id)."""
        return _read_json(self.path / "run.json")

    # ---- status ----

    def status(self) -> Status:
        try:
            values = json.loads((self.path / "status.json").read_bytes())
        except FileNotFoundError:
            return Status()
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{self.path}/status.json is damaged ({error}); delete it to train the run again"
            ) from None
        known = {field.name for field in fields(Status)}
        return Status(**{key: value for key, value in values.items() if key in known})

    def update_status(self, **changes: Any) -> Status:
        """Change some fields of status.json. Going (back) to work clears what an earlier ending has left."""
        cleared = (
            {} if changes.get("state") in (None, *FINAL_STATES) else {"reason": None, "error": None, "ended_ms": None}
        )
        status = replace(self.status(), **(cleared | changes))
        if status.state not in STATES:
            raise ValueError(f"state: no such state '{status.state}'; known: {', '.join(STATES)}")
        atomic_write(self.path / "status.json", json.dumps(asdict(status)) + "\n")
        return status

    def fail(self, error: Exception | str) -> dict[str, Any]:
        """Mark the run failed, in one line, with the whole story in error.txt. Returns the report of it."""
        whole = error if isinstance(error, str) else "".join(traceback.format_exception(error))
        atomic_write(self.path / "error.txt", whole.rstrip("\n") + "\n")
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        line = " ".join(text.splitlines()[0].split())
        self.update_status(state="failed", error=line, ended_ms=time.time_ns() // 1_000_000)
        return {"run_id": self.run_id, "state": "failed", "error": line}

    def request_prune(self, reason: str) -> None:
        """A scheduler's decision, on disk so that it outlives a crash."""
        atomic_write(self.path / "prune_request.json", json.dumps({"reason": reason}) + "\n")

    def prune_request(self) -> str | None:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return str(json.loads((self.path / "prune_request.json").read_bytes())["reason"])
        return None

    def request_pause(self, pause: bool = True) -> None:
        """Ask workers elsewhere to save the run and leave it; or take that back."""
        path = self.path / "pause_request"
        if pause:
            atomic_write(path, "")
        else:
            path.unlink(missing_ok=True)

    def pause_requested(self) -> bool:
        return (self.path / "pause_request").exists()

    # ---- journal ----

    @property
    def journal_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def append_metrics(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        """One line. Raises ValueError unless `step` is beyond the journal's last one."""
        if self._journal_file is None:
            self._open_journal()
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"{self.journal_path}: step {step} does not come after step {self._last_step}")
        now = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        assert self._journal_file is not None
        self._journal_file.write(json.dumps({"step": step, "time_ms": now, "metrics": dict(metrics)}) + "\n")
        self._last_step = step

    def _open_journal(self) -> None:
        lines, torn = _parse_journal(self.journal_path)
        if torn:
            self._write_journal(lines)
        self._last_step = lines[-1]["step"] if lines else None
        self._journal_file = self.journal_path.open("a", encoding="utf-8", buffering=1)

    def sync_journal(self) -> None:
        """Everything appended so far is on disk when this returns. Closes the file; the next append opens it again."""
        if self._journal_file is not None:
            self._journal_file.flush()
            os.fsync(self._journal_file.fileno())
            self._journal_file.close()
            self._journal_file = None

    def truncate_journal(self, after_step: int) -> None:
        """Forget the lines beyond `after_step`, and a torn last line: training goes on from there."""
        self.sync_journal()
        lines, torn = _parse_journal(self.journal_path)
        kept = [line for line in lines if line["step"] <= after_step]
        if torn or len(kept) < len(lines):
            self._write_journal(kept)
        self._last_step = kept[-1]["step"] if kept else None

    def _write_journal(self, lines: list[dict[str, Any]]) -> None:
        atomic_write(self.journal_path, "".join(json.dumps(line) + "\n" for line in lines))

    def journal(self) -> list[dict[str, Any]]:
        """All whole lines: {"step", "time_ms", "metrics"}, steps strictly increasing."""
        return _parse_journal(self.journal_path)[0]

    def journal_frame(self) -> pd.DataFrame:
        """Long form: step, time_ms, metric, value."""
        import pandas as pd

        rows = [(x["step"], x["time_ms"], name, value) for x in self.journal() for name, value in x["metrics"].items()]
        return pd.DataFrame(rows, columns=["step", "time_ms", "metric", "value"])

    # ---- checkpoints ----

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        with contextlib.suppress(FileNotFoundError):
            names = [entry.name for entry in os.scandir(self.checkpoints)]
            return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())
        return []

    def checkpoint_step(self) -> int:
        """The newest one's step; 0 without any."""
        return max(self.checkpoint_steps(), default=0)

    def best_step(self) -> int:
        """Of the checkpoints that are there, the best by `checkpointing.best_metric`; without that the newest."""
        settings = self.experiment_dict()["checkpointing"]
        steps = set(self.checkpoint_steps())
        values = {
            line["step"]: line["metrics"][settings["best_metric"]]
            for line in self.journal()
            if line["step"] in steps and settings["best_metric"] in line["metrics"]
        }
        if not values:
            return self.checkpoint_step()
        return (max if settings["best_mode"] == "max" else min)(values, key=lambda step: values[step])

    def checkpoint_folder(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"


class JournalTail:
    """Reads a journal as it grows. After `truncate_journal` it starts over: callers skip the steps they know."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._mark = b""  # the bytes before the offset, to notice that the file is another one

    def read(self) -> list[dict[str, Any]]:
        """The whole lines that have come since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._mark))
                if file.read(len(self._mark)) != self._mark:
                    self._offset = 0
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self._offset += len(whole)
            self._mark = whole[-64:]
        elif self._offset == 0:
            self._mark = b""
        return [line for text in whole.splitlines() if (line := _parse_line(text, self.path)) is not None]


class SweepFolder:
    """A sweep's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_name(self.path.name, "sweep name")

    @property
    def name(self) -> str:
        return self.path.name

    def description(self) -> dict[str, Any]:
        """sweep.json; empty where there is none yet."""
        return _read_json(self.path / "sweep.json") if (self.path / "sweep.json").exists() else {}

    def run(self, run_id: str) -> RunFolder:
        return RunFolder(self.path / "runs" / check_name(run_id, "run id"))

    def has_run(self, run_id: str) -> bool:
        return self.run(run_id).exists()

    def runs(self) -> list[RunFolder]:
        """All whole run folders, by run id."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = sorted(entry.name for entry in os.scandir(self.path / "runs") if not entry.name.startswith("."))
            return [folder for folder in map(self.run, names) if folder.exists()]
        return []

    def create_run(self, run: PlannedRun, pack: str, number: int) -> RunFolder:
        """The run's folder, new or with what it has trained so far."""
        folder = self.run(run.run_id)
        folder.write_new(run.experiment, run.name, run.axes, pack, number, run.inputs)
        return folder

    def frame(self) -> pd.DataFrame:
        """One row a reading: run_id, name, number, state, the axes by path, step, time_ms, the metrics (NaN where
        not measured). A run without a reading has one row without a step."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for folder in self.runs():
            description, status = folder.description(), folder.status()
            fixed = {key: description[key] for key in ("name", "number")}
            fixed = {"run_id": folder.run_id, **fixed, "state": status.state, **description["axes"]}
            lines = folder.journal() or [{"step": None, "time_ms": None, "metrics": {}}]
            rows += [{**fixed, "step": x["step"], "time_ms": x["time_ms"], **x["metrics"]} for x in lines]
        columns = ["run_id", "name", "number", "state", "step", "time_ms"]
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def list_sweeps(output: str | Path) -> list[SweepFolder]:
    """The sweeps below an output folder, by name."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = sorted(entry.name for entry in os.scandir(output) if not entry.name.startswith("."))
        paths = [Path(output) / name for name in names if name != "artifacts"]  # the tracking store's own
        return [SweepFolder(path) for path in paths if (path / "runs").is_dir()]
    return []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged ({error})") from None


def _parse_journal(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """-> whole lines, whether anything else is in the file (a torn last line, as a killed writer leaves it)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], False
    whole, newline, rest = data.rpartition(b"\n")
    texts = whole.split(b"\n") if newline else []
    lines = [line for text in texts if (line := _parse_line(text, path)) is not None]
    return lines, bool(rest) or len(lines) < len(texts)


def _parse_line(text: bytes, path: Path) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        if isinstance(line["metrics"], dict) and isinstance(line["step"], int) and "time_ms" in line:
            return line
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        pass
    log.warning("%s: passing over a damaged line", path)
    return None
