"""What is planned: an experiment of a file (YAML, JSON, Python, a sweep) or a preset, with overrides."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from groundswell.config import ConfigError, suggest
from groundswell.experiment import Experiment
from groundswell.planning.strategies import PlanExtras
from groundswell.sweep import Sweep

SUFFIXES = (".py", ".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Subject:
    """An experiment to plan."""

    name: str
    experiment: Experiment
    extras: PlanExtras | None = None


def presets_folder() -> Path | None:
    """The folder sweeps/plans, wherever the sweeps are installed."""
    spec = importlib.util.find_spec("sweeps")
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((Path(place) / "plans" for place in places if (Path(place) / "plans").is_dir()), None)


def presets() -> dict[str, Path]:
    """Name -> file."""
    folder = presets_folder()
    files = sorted(folder.iterdir()) if folder else []
    return {path.stem: path for path in files if path.suffix in SUFFIXES and not path.stem.startswith("_")}


def load(name: str, overrides: Mapping[str, Any], sweep_preset: str | None = None) -> Subject:
    """By a file's path or a preset's name; of a sweep file, the first run of its `sweep_preset`.

    Raises ConfigError for what is neither, or defines no experiment, and for a sweep file without `sweep_preset`.
    """
    path = Path(name)
    if path.suffix not in SUFFIXES:
        known = presets()
        if name not in known:
            raise ConfigError(f"{name}: no such preset and no .py, .yaml or .json file; {suggest(name, list(known))}")
        path = known[name]
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; write a preset's name or the path of an experiment")
    if path.suffix == ".py":
        subject = _from_python(path, sweep_preset)
    else:
        subject = Subject(path.stem, Experiment.from_file(path))
    experiment = subject.experiment.with_overrides(dict(overrides)) if overrides else subject.experiment
    return Subject(subject.name, experiment, subject.extras)


def _from_python(path: Path, sweep_preset: str | None) -> Subject:
    module = _run_file(path)
    experiment = getattr(module, "experiment", None)
    if isinstance(experiment, Experiment):
        return Subject(path.stem, experiment, getattr(module, "plan_extras", None))
    build = getattr(module, "build", None)
    if not callable(build):
        raise ConfigError(f"{path}: defines no experiment; set `experiment = Experiment(...)`, or write a sweep")
    if sweep_preset is None:
        raise ConfigError(f"{path}: is a sweep; start it with: python {path}")
    try:
        sweep = build(sweep_preset)
    except KeyError:
        raise ConfigError(
            f"--preset {sweep_preset}: {path} has no such preset; python {path} --help lists them"
        ) from None
    return Subject(sweep.name, _first_run(sweep))


def _first_run(sweep: Sweep) -> Experiment:
    """With the first value of each axis, or one that is drawn where an axis is a range only."""
    ranges = any(not axis.values for axis in sweep.search_axes().values())
    settings = sweep.sample(1, 0) if ranges else sweep.grid()
    return sweep.runs(settings[0])[0].experiment


def _run_file(path: Path) -> ModuleType:
    """The user's own file, run as `python file.py` would be, but not as __main__."""
    spec = importlib.util.spec_from_file_location(f"_plan_{path.stem.replace('-', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return module


def summary(path: Path) -> str:
    """The first line of a file's docstring or comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].strip('#" ') if lines else ""
