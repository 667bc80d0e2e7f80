"""Probes: questions to one checkpoint. (checkpoint, task) -> numbers, arrays, tables and figures beside the run.

What a probe finds is kept in `runs/<id>/probes/step-N/<probe>/`: scalars.json, *.npy, *.csv, *.png, and probe.json,
which says what was asked. A question that has been answered is not asked again.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from groundswell.config import Component, ConfigError
from groundswell.files import atomic_folder, check_name
from groundswell.rundir import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from groundswell.experiment import Experiment

SCALARS, QUESTION = "scalars.json", "probe.json"


@dataclass(frozen=True)
class Opened:
    """A checkpoint to compute with; its tensors have a run axis of one, [1, *shape]."""

    experiment: Experiment
    step: int
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True)
class Findings:
    """`scalars` are metrics of the run at the checkpoint's step, by whole name; the rest are files, by stem."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)


class Probe(Component, ABC):
    """One question. Its fields say how it is asked."""

    @classmethod
    def name(cls) -> str:
        """LogitHeatMaps -> logit_heat_maps."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def applies(self, experiment: Experiment) -> bool:
        """Can this run be asked?"""
        return True

    @abstractmethod
    def run(self, opened: Opened) -> Findings: ...


def open_checkpoint(folder: RunFolder, step: int | None = None) -> Opened:
    """The checkpoint of `step`, or the newest. Raises ConfigError where there is none or it is damaged."""
    from groundswell.training import checkpoint

    steps = folder.checkpoint_steps()
    if not steps or (step is not None and step not in steps):
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"run {folder.run_id} has no checkpoint at step {step or 'any'}; there are: {known}")
    step = steps[-1] if step is None else step
    experiment = folder.experiment()
    task = experiment.task
    weights = checkpoint.load_weights(
        folder.checkpoint_folder(step), experiment.model, task.vocab_size, task.max_length
    )
    return Opened(experiment, step, {name: tensor.unsqueeze(0) for name, tensor in weights.items()})


def probe_folder(folder: RunFolder, step: int, name: str) -> Path:
    return folder.path / "probes" / f"step-{step:08d}" / check_name(name, "probe name")


def run_probes(folder: RunFolder, probes: Iterable[Probe], step: int | None = None) -> list[Path]:
    """Ask what has not been answered yet. Returns the folders of the new answers. Raises as `open_checkpoint`."""
    experiment = folder.experiment()
    steps = folder.checkpoint_steps()
    step = steps[-1] if step is None and steps else step
    new: list[Path] = []
    opened: Opened | None = None
    for probe in probes:
        if not probe.applies(experiment):
            continue
        if step is not None and _answered(probe_folder(folder, step, probe.name()), probe):
            continue
        opened = opened or open_checkpoint(folder, step)
        new.append(_write(probe_folder(folder, opened.step, probe.name()), probe, probe.run(opened)))
    return new


def _answered(path: Path, probe: Probe) -> bool:
    return (path / QUESTION).exists() and (path / QUESTION).read_text() == probe.canonical_json()


def _write(path: Path, probe: Probe, findings: Findings) -> Path:
    import numpy as np

    shutil.rmtree(path, ignore_errors=True)  # the answer to another question
    with atomic_folder(path) as folder:
        (folder / SCALARS).write_text(json.dumps(dict(findings.scalars), indent=1) + "\n")
        for stem, array in findings.arrays.items():
            np.save(folder / f"{check_name(stem, 'array name')}.npy", array)
        for stem, table in findings.tables.items():
            table.to_csv(folder / f"{check_name(stem, 'table name')}.csv", index=False)
        for stem, figure in findings.figures.items():
            figure.savefig(folder / f"{check_name(stem, 'figure name')}.png", dpi=150)
        (folder / QUESTION).write_text(probe.canonical_json())
    return path


def answers(folder: RunFolder) -> dict[tuple[int, str], Path]:
    """(step, probe name) -> folder of every answer."""
    found = {}
    for path in sorted((folder.path / "probes").glob("step-*/*/" + QUESTION)):
        found[int(path.parents[1].name[5:]), path.parent.name] = path.parent
    return found


def scalars(path: Path) -> dict[str, float]:
    return json.loads((path / SCALARS).read_bytes())
