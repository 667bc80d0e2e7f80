"""What a sweep has measured, as tables: the input of every report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from groundswell import probes
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun

Answer = tuple[dict[str, float], dict[str, np.ndarray]]  # scalars, arrays


@dataclass(frozen=True)
class Results:
    """`runs`: one row a run (run_id, name, state, step, reason, error, and a column for each axis, named by its path).
    `history`: one row a reading (run_id, step, and a column for each metric; NaN where it was not measured).
    """

    runs: pd.DataFrame
    history: pd.DataFrame
    axes: tuple[str, ...]
    replicate_axis: str
    folder: SweepFolder | None = None

    @property
    def setting_axes(self) -> list[str]:
        return [path for path in self.axes if path != self.replicate_axis]

    def curves(self, metric: str) -> pd.DataFrame:
        """Rows where the metric was measured: run_id, step, value, and the run's axes."""
        if metric not in self.history:
            return pd.DataFrame(columns=["run_id", "step", "value", *self.axes])
        rows = self.history.loc[self.history[metric].notna(), ["run_id", "step", metric]].rename(
            columns={metric: "value"}
        )
        return rows.merge(self.runs[["run_id", *self.axes]], on="run_id")

    def answer(self, run_id: str, probe: str) -> Answer:
        """What a probe found in a run's newest probed checkpoint; empty where it was not asked."""
        paths = self._answer_folders(run_id, probe)
        return _read_answer(paths[max(paths)]) if paths else ({}, {})

    def answers(self, run_id: str, probe: str) -> dict[int, Answer]:
        """What a probe found, by step, ascending."""
        return {step: _read_answer(path) for step, path in self._answer_folders(run_id, probe).items()}

    def _answer_folders(self, run_id: str, probe: str) -> dict[int, Path]:
        found = probes.answers(self.folder.run(run_id)) if self.folder else {}
        return {step: path for (step, name), path in sorted(found.items()) if name == probe}


def _read_answer(path: Path) -> Answer:
    return probes.scalars(path), {file.stem: np.load(file) for file in sorted(path.glob("*.npy"))}


def load_results(
    folder: SweepFolder, planned: Sequence[PlannedRun], axes: Sequence[str], replicate_axis: str
) -> Results:
    """Read the journals and statuses of these runs."""
    rows, readings = [], []
    for run in planned:
        run_folder = folder.run(run.run_id)
        status = run_folder.status()
        rows.append(
            {
                "run_id": run.run_id,
                "name": run.name,
                "state": status.state,
                "step": status.step,
                "reason": status.reason or "",
                "error": status.error or "",
                **{path: run.axes.get(path) for path in axes},
            }
        )
        readings += [{"run_id": run.run_id, "step": line["step"], **line["metrics"]} for line in run_folder.journal()]
    history = pd.DataFrame(readings) if readings else pd.DataFrame(columns=["run_id", "step"])
    return Results(pd.DataFrame(rows), history, tuple(axes), replicate_axis, folder)
