"""Probes: questions to one checkpoint. (checkpoint, task) -> numbers, arrays, tables, figures, texts beside the run.

What a probe finds is kept in `runs/<id>/probes/step-N/<probe>/`: scalars.json, *.npy, *.csv, *.png, texts, and
probe.json, which says what was asked. A question that has been answered is not asked again. What the answers of a run
show together is in `runs/<id>/probes/over_time/<probe>/`.

A big question is divided into parts, which several processes answer. Each part is kept as it ends, in
`runs/<id>/probes/parts/step-N/<probe>-<digest>/<part>/`, and together they make the answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from groundswell.config import Component, ConfigError, import_path
from groundswell.files import atomic_folder, check_name
from groundswell.rundir import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from groundswell.experiment import Experiment

SCALARS, QUESTION = "scalars.json", "probe.json"
OVER_TIME, PARTS = "over_time", "parts"


@dataclass(frozen=True)
class Opened:
    """A checkpoint to compute with; its tensors have a run axis of one, [1, *shape]."""

    experiment: Experiment
    step: int
    parameters: Mapping[str, Tensor]
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)  # what its probes compute once for all of them

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and where data must go."""
        return next(iter(self.parameters.values())).device


@dataclass(frozen=True)
class Findings:
    """`scalars` are metrics of the run at the checkpoint's step, by whole name; the rest are files, by stem, and
    `texts` by whole file name."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


class Probe(Component, ABC):
    """One question. Its fields say how it is asked.

    `headlines` are patterns (fnmatch) of the scalars that a command's table shows.
    """

    headlines: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def name(cls) -> str:
        """LogitHeatMaps -> logit_heat_maps."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def objection(self, experiment: Experiment) -> str | None:
        """Why this run cannot be asked, in one line; None where it can."""
        return None

    def applies(self, experiment: Experiment) -> bool:
        """Can this run be asked?"""
        return self.objection(experiment) is None

    @abstractmethod
    def run(self, opened: Opened) -> Findings: ...

    def over_time(self, folder: RunFolder, answers: Mapping[int, Path]) -> Findings | None:
        """What the answers of one run (step -> folder, ascending) show together. Its scalars are no metrics."""
        return None


@dataclass(frozen=True)
class Part:
    """A piece of a divided question. `name` is its folder's, and says just what `items` is."""

    name: str
    cost: float  # relative to the other parts'
    items: tuple[Any, ...] = ()


class DividedProbe(Probe):
    """A question that takes long: many processes answer its parts."""

    def part_question(self) -> str:
        """What a part's answer depends on, besides its items: questions that agree in it share their parts."""
        return self.canonical_json()

    @abstractmethod
    def parts(self, experiment: Experiment, stored: Sequence[Path]) -> list[Part]:
        """What is left to answer beside the parts in these folders."""

    @abstractmethod
    def run_part(self, opened: Opened, part: Part) -> Findings: ...

    @abstractmethod
    def join(self, experiment: Experiment, stored: Sequence[Path]) -> Findings:
        """The answer, once `parts` has nothing left. The folders may hold more than this question asks for."""

    def run(self, opened: Opened) -> Findings:
        raise TypeError(f"{self.name()} is answered in parts; `groundswell.probes.ask` does it")


def objection(probe: Probe, experiment: Experiment) -> str | None:
    """Why the probe does not ask this run; None where it does."""
    if probe.applies(experiment):
        return None
    return probe.objection(experiment) or f"not for task {import_path(type(experiment.task))} with this model"


def open_checkpoint(folder: RunFolder, step: int | None = None, device: str = "cpu") -> Opened:
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
    return Opened(experiment, step, {name: tensor.unsqueeze(0).to(device) for name, tensor in weights.items()})


# ---- asking ----


def probe_folder(folder: RunFolder, step: int, name: str) -> Path:
    return folder.path / "probes" / f"step-{step:08d}" / check_name(name, "probe name")


def unanswered(folder: RunFolder, step: int, probes: Iterable[Probe]) -> list[Probe]:
    """Probes whose question, as it is asked now, has no answer at this step."""
    places = ((probe, probe_folder(folder, step, probe.name())) for probe in probes)
    return [probe for probe, path in places if not _holds(path, probe.canonical_json())]


def ask(folder: RunFolder, step: int, probes: Iterable[Probe], device: str = "cpu") -> dict[str, Exception]:
    """Ask a checkpoint what has not been answered yet, loading it once.

    Returns probe name -> error of those that failed: they do not stop the others. Raises as `open_checkpoint`.
    """
    left = unanswered(folder, step, probes)
    opened = open_checkpoint(folder, step, device) if left else None
    failed: dict[str, Exception] = {}
    for probe in left:
        assert opened is not None
        try:
            findings = _in_parts(folder, opened, probe) if isinstance(probe, DividedProbe) else probe.run(opened)
            _write(probe_folder(folder, step, probe.name()), probe.canonical_json(), findings)
        except Exception as error:
            failed[probe.name()] = error
    return failed


def _in_parts(folder: RunFolder, opened: Opened, probe: DividedProbe) -> Findings:
    """The whole answer: what other processes have left of the parts, then all of them together."""
    for part in parts_left(folder, opened.step, probe):
        ask_part(folder, opened, probe, part)
    return probe.join(opened.experiment, _stored_parts(folder, opened.step, probe))


def parts_left(folder: RunFolder, step: int, probe: DividedProbe) -> list[Part]:
    """What is left of the question at this step, the most expensive first."""
    left = probe.parts(folder.experiment(), _stored_parts(folder, step, probe))
    return sorted(left, key=lambda part: -part.cost)


def ask_part(folder: RunFolder, opened: Opened, probe: DividedProbe, part: Part) -> None:
    """Answer a part and keep what is found."""
    path = _parts_folder(folder, opened.step, probe) / check_name(part.name, "part name")
    if not _holds(path, probe.part_question()):
        _write(path, probe.part_question(), probe.run_part(opened, part))


def _parts_folder(folder: RunFolder, step: int, probe: DividedProbe) -> Path:
    digest = hashlib.sha256(probe.part_question().encode()).hexdigest()[:12]
    return folder.path / "probes" / PARTS / f"step-{step:08d}" / check_name(f"{probe.name()}-{digest}", "probe name")


def _stored_parts(folder: RunFolder, step: int, probe: DividedProbe) -> list[Path]:
    found = sorted(_parts_folder(folder, step, probe).glob("*/" + QUESTION))
    return [path.parent for path in found if not path.parent.name.startswith(".")]


def run_probes(folder: RunFolder, probes: Iterable[Probe], step: int | None = None) -> list[Path]:
    """Ask what has not been answered yet. Returns the folders of the new answers. Raises as `open_checkpoint`, and,
    once all have been asked, what the first of those that failed has raised."""
    experiment = folder.experiment()
    step = folder.checkpoint_step() if step is None else step
    left = unanswered(folder, step, [probe for probe in probes if probe.applies(experiment)])
    for error in ask(folder, step, left).values():
        raise error
    return [probe_folder(folder, step, probe.name()) for probe in left]


def _holds(path: Path, question: str) -> bool:
    """Is there an answer to just this question?"""
    return (path / QUESTION).exists() and (path / QUESTION).read_text() == question


def _write(path: Path, question: str, findings: Findings) -> None:
    import numpy as np

    try:
        with atomic_folder(path) as folder:
            for name, text in findings.texts.items():
                (folder / check_name(name, "text name")).write_text(text, encoding="utf-8")
            values = {name: float(value) for name, value in findings.scalars.items()}
            (folder / SCALARS).write_text(json.dumps(values, indent=1) + "\n")
            for stem, array in findings.arrays.items():
                np.save(folder / f"{check_name(stem, 'array name')}.npy", array)
            for stem, table in findings.tables.items():
                table.to_csv(folder / f"{check_name(stem, 'table name')}.csv", index=False)
            for stem, figure in findings.figures.items():
                figure.savefig(folder / f"{check_name(stem, 'figure name')}.png", dpi=150)
            (folder / QUESTION).write_text(question)
            if not _holds(path, question):
                shutil.rmtree(path, ignore_errors=True)  # the answer to another question
    except FileExistsError:
        if not _holds(path, question):  # else: another process was quicker
            raise


# ---- over time ----


def look_over_time(folder: RunFolder, probe: Probe) -> bool:
    """Let the probe look at all of the run's answers where they are other ones than last time. Returns if it did."""
    if not is_over_time_due(folder, probe):
        return False
    question, mine = _over_time_question(folder, probe)
    findings = probe.over_time(folder, mine) or Findings()
    _write(_over_time_folder(folder, probe.name()), question, findings)
    return True


def is_over_time_due(folder: RunFolder, probe: Probe) -> bool:
    if type(probe).over_time is Probe.over_time:
        return False
    question, mine = _over_time_question(folder, probe)
    return bool(mine) and not _holds(_over_time_folder(folder, probe.name()), question)


def _over_time_folder(folder: RunFolder, name: str) -> Path:
    return folder.path / "probes" / OVER_TIME / check_name(name, "probe name")


def _over_time_question(folder: RunFolder, probe: Probe) -> tuple[str, dict[int, Path]]:
    """-> the probe and the answers that it looks at, as text; those answers."""
    question = probe.canonical_json()
    mine = {step: path for (step, name), path in answers(folder).items() if name == probe.name()}
    mine = {step: path for step, path in mine.items() if _holds(path, question)}
    written = {step: (path / QUESTION).stat().st_mtime_ns for step, path in mine.items()}
    return json.dumps({"probe": json.loads(question), "answers": written}, sort_keys=True), mine


# ---- reading ----


def answers(folder: RunFolder) -> dict[tuple[int, str], Path]:
    """(step, probe name) -> folder of every answer, ascending."""
    found = {}
    for path in sorted((folder.path / "probes").glob("step-*/*/" + QUESTION)):
        found[int(path.parents[1].name[5:]), path.parent.name] = path.parent
    return found


def answers_over_time(folder: RunFolder) -> dict[str, Path]:
    """Probe name -> folder of what its answers show together."""
    found = sorted((folder.path / "probes" / OVER_TIME).glob("*/" + QUESTION))
    return {path.parent.name: path.parent for path in found}


def scalars(path: Path) -> dict[str, float]:
    return json.loads((path / SCALARS).read_bytes())
