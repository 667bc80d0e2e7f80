"""Networks that an earlier sweep has trained, for sweeps that start from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundswell.config import ConfigError
from groundswell.rundir import RunFolder, SweepFolder


def newest_finished(sweep: str | Path, wanted: Callable[[RunFolder], bool]) -> RunFolder | None:
    """Of the finished runs of the sweep in this folder that are wanted, the one that ended last."""
    found = []
    for run in SweepFolder(sweep).runs():
        status = run.status()
        if status.state == "finished" and wanted(run):
            found.append((status.ended_ms or 0, run.run_id, run))
    return max(found)[2] if found else None


def trained_run(sweep: str | Path, command: str, **axes: Any) -> RunFolder:
    """A finished run of the sweep in this folder with these axis values; of several the one that ended last.

    Raises ConfigError where there is none: `command` is what trains it.
    """

    def wanted(run: RunFolder) -> bool:
        values = run.description()["axes"]
        return all(values.get(name) == value for name, value in axes.items())

    run = newest_finished(sweep, wanted)
    if run is None:
        told = " and ".join(f"{name}={value}" for name, value in axes.items())
        raise ConfigError(f"{sweep}: no finished run{' with ' * bool(told)}{told}; train it first: {command}")
    return run


def trained_networks(sweep: str | Path, command: str, axis: str) -> dict[Any, str]:
    """Value of the axis -> folder of the newest checkpoint of such a run. Raises ConfigError where there is none."""
    values = {run.description()["axes"].get(axis) for run in SweepFolder(sweep).runs()} - {None}
    found = {}
    for value in sorted(values, key=str):
        with contextlib.suppress(ConfigError):
            run = trained_run(sweep, command, **{axis: value})
            found[value] = str(run.checkpoint_folder(run.checkpoint_step()))
    if not found:
        trained_run(sweep, command)
    return found
